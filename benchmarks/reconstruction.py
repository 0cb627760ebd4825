"""Reconstruct a training digit from one update of a model: exactly without privacy, and not at all with it.

    uv run python benchmarks/reconstruction.py --out docs/reconstruction.png --three-rows docs/landing.png

Two attacks on the update of one step, both knowing the model and the label:

- *analytic*: a fully connected first layer with biases has the gradients δxᵀ and δ, so their quotient is the input x
  (Phong et al. 2018, arXiv 1706.04702, observation 3);
- *matching*: an image is optimised until its gradient points where the update does (Zhu, Liu and Han 2019, arXiv
  1906.08935; with the cosine distance of Geiping et al. 2020, arXiv 2003.14053).

The threat model is the strongest there is, that of Balle, Cherubin and Hayes (2022, arXiv 2201.04845): the attacker knows
everything but one example. So all other gradients of the batch are subtracted exactly, and what is left of the private
update is the clipped gradient of the target and the noise that (ε, δ) asks for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from lightning_dp.accounting import noise_multiplier_for
from lightning_dp.data.digits import DigitsDataModule
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import release
from lightning_dp.plan.privacy_plan import PrivacyPlan

TARGETS, STEPS, BATCH, DELTA = 20, 100, 256, 1e-5
Gradient = dict[str, Tensor]
KINDS = {
    "ε = 8 in 100 steps": (8.0, STEPS),
    "ε = 8 in one step": (8.0, 1),  # all of the budget for the step that is attacked
    "ε = 100,000 in one step": (1e5, 1),  # private in name only
}


def network() -> nn.Module:
    """A small classifier whose first layer is fully connected, at its random start."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


def gradient_of(model: nn.Module, image: Tensor, label: Tensor) -> Gradient:
    """The gradient of the loss of one example, ``image`` of shape ``(1, 8, 8)``."""

    def loss(parameters: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(functional_call(model, dict(parameters), image[None]), label[None])

    return grad(loss)({name: parameter.detach() for name, parameter in model.named_parameters()})


def private_update(gradient: Gradient, epsilon: float, steps: int, examples: int, seed: int) -> Gradient:
    """What is left of a private step once everything but the target is subtracted: the library's own release."""
    q = BATCH / examples
    plan = PrivacyPlan(
        noise_multiplier=noise_multiplier_for(epsilon, DELTA, q, steps),
        clip_norm=1.0, delta=DELTA, dataset_size=examples, expected_batch_size=BATCH,
    )  # fmt: skip
    norm = torch.sqrt(sum((part.square().sum() for part in gradient.values()), torch.zeros(())))
    clipped = {name: part * min(1.0, 1.0 / float(norm)) for name, part in gradient.items()}
    return {
        name: part * BATCH for name, part in release(clipped, plan.mechanism, RandomKey.from_seed(seed), 0)[0].items()
    }


def analytic(gradient: Gradient) -> Tensor:
    """The input of the first layer, from the row with the largest gradient of the bias."""
    weight, bias = gradient["1.weight"], gradient["1.bias"]
    row = int(bias.abs().argmax())
    return (weight[row] / bias[row]).reshape(8, 8).clamp(-1, 1)


def matching(model: nn.Module, updates: list[Gradient], labels: Tensor, iterations: int = 300) -> Tensor:
    """Images whose gradients point where the updates do, found by Adam from grey; shape ``(n, 8, 8)``."""
    target = torch.stack([torch.cat([part.flatten() for part in update.values()]) for update in updates])
    images = torch.zeros(len(updates), 1, 8, 8).add_(0.01 * torch.randn(len(updates), 1, 8, 8)).requires_grad_()
    optimizer = torch.optim.Adam([images], lr=0.05)
    both = vmap(lambda image, label: gradient_of(model, image, label))
    for _ in range(iterations):
        found = both(images, labels)
        flat = torch.cat([part.flatten(1) for part in found.values()], dim=1)
        loss = (1 - nn.functional.cosine_similarity(flat, target)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            images.clamp_(-1, 1)
    return images.detach()[:, 0]


def correlation(found: Tensor, true: Tensor) -> float:
    """The mean over images of the correlation of pixels; 1 is the image itself, 0 is nothing of it."""
    a, b = (rows.flatten(1) - rows.flatten(1).mean(1, keepdim=True) for rows in (found, true))
    return float(nn.functional.cosine_similarity(a, b).mean())


def attack(targets: int = TARGETS) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Pictures and mean correlations with the truth, for each attack and each of :data:`KINDS` of update.

    ``"guess"`` looks at no update: the mean training digit of the right class, which the attacker may know.
    """
    data = DigitsDataModule()
    data.setup()
    images, labels = data.train_set.tensors
    chosen = torch.linspace(0, len(images) - 1, targets).long()
    true, classes, model = images[chosen], labels[chosen], network()
    raw = [gradient_of(model, image, label) for image, label in zip(true, classes, strict=True)]
    kinds = {"no privacy": raw}
    for kind, (epsilon, steps) in KINDS.items():
        kinds[kind] = [private_update(one, epsilon, steps, len(images), seed) for seed, one in enumerate(raw)]
    pictures = {"truth": true[:, 0]}
    for kind, updates in kinds.items():
        pictures[f"analytic, {kind}"] = torch.stack([analytic(update) for update in updates])
        torch.manual_seed(1)
        pictures[f"matching, {kind}"] = matching(model, updates, classes)
    pictures["guess"] = torch.stack([images[labels == label].mean(0)[0] for label in classes])
    return pictures, {name: correlation(found, pictures["truth"]) for name, found in pictures.items()}


def draw(pictures: dict[str, Tensor], shown: int = 10) -> Tensor:
    """One row of digits for each of ``pictures``, as bytes ``(height, width)``; white is ink."""
    scale, gap = 4, 4
    rows = []
    for found in pictures.values():
        tiles = [nn.functional.pad((one + 1) / 2, (0, 1, 0, 1), value=0.5) for one in found[:shown]]
        rows.append(torch.cat(tiles, dim=1).repeat_interleave(scale, 0).repeat_interleave(scale, 1))
        rows.append(torch.full((gap, rows[0].shape[1]), 0.5))
    return (torch.cat(rows[:-1]).clamp(0, 1) * 255).to(torch.uint8)


def three_rows(pictures: dict[str, Tensor], to: Path, shown: int = 10) -> None:
    """The digits, and what is rebuilt of them without and with privacy, each row with its name."""
    import matplotlib.pyplot as plt

    rows = {
        "training digits": "truth",
        "rebuilt from one update\nwithout privacy": "analytic, no privacy",
        "rebuilt from one update\nat ε = 8": "matching, ε = 8 in 100 steps",
    }
    figure, axes = plt.subplots(3, shown, figsize=(9, 2.8), gridspec_kw={"wspace": 0.08, "hspace": 0.12})
    for line, (name, kind) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, pictures[kind], strict=False):
            axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
            axis.set_axis_off()
        line[0].text(-1.5, 3.5, name, ha="right", va="center", fontsize=11)
    figure.subplots_adjust(left=0.24, right=0.995, top=0.99, bottom=0.01)
    figure.savefig(to, dpi=150, facecolor="white")
    plt.close(figure)


def main() -> None:
    """Attack, print the correlations as JSON, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the picture")
    parser.add_argument("--three-rows", type=Path, help="where to write the picture of three rows, with their names")
    arguments = parser.parse_args()
    pictures, correlations = attack()
    print(json.dumps({name: round(value, 3) for name, value in correlations.items()}, ensure_ascii=False, indent=2))
    if arguments.out is not None:
        from torchvision.io import write_png

        write_png(draw(pictures)[None], str(arguments.out))
    if arguments.three_rows is not None:
        three_rows(pictures, arguments.three_rows)


if __name__ == "__main__":
    main()
