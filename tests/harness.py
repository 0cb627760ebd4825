"""One private run by hand, and the same by the package: for each engine, clipping style, number of views, unit and rank.

:func:`by_hand` is DP-SGD as anybody can check it: one privacy unit at a time, plain autograd, plain arithmetic. Taken from the
package are only the streams of random numbers: which units a seed draws, the numbers of their views, and the noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.transforms import ViewTransform
from lightning_dp.batches.views import view_uniforms
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights

OWNERS = [0, 1, 0, 2, 0, 3, 4, 4, 0, 5, 5, 5, 6, 7, 7, 0, 8, 9, 9, 0, 10, 11, 11, 11]
"""Whose each of 24 examples is: twelve users with one to six examples."""

FEATURES, GAMMA, BINS = 4, 0.05, 10


class Shift(ViewTransform):
    """Views of a vector."""

    draws = FEATURES

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        return images + uniforms


def flat(parts: list[Tensor], clip: float) -> Tensor:
    gradient = torch.cat([part.flatten() for part in parts])
    return gradient * min(1.0, clip / float(gradient.norm()))


def per_layer(parts: list[Tensor], clip: float) -> Tensor:
    """The regressor has two layers, each with a weight and a bias."""
    return torch.cat([flat(parts[:2], clip / math.sqrt(2)), flat(parts[2:], clip / math.sqrt(2))])


def automatic(parts: list[Tensor], clip: float) -> Tensor:
    gradient = torch.cat([part.flatten() for part in parts])
    return gradient * clip / (float(gradient.norm()) + GAMMA)


def quantile(parts: list[Tensor], clip: float) -> Tensor:
    """Beside the gradient whether its norm is at most C, as a tenth of C or its opposite."""
    norm = float(torch.cat([part.flatten() for part in parts]).norm())
    return torch.cat([flat(parts, clip), parts[0].new_tensor([0.1 * clip if norm <= clip else -0.1 * clip])])


def slaclip(parts: list[Tensor], clip: float) -> Tensor:
    """Beside the gradient what is left of C, in slots that fill up one after the other."""
    norm, full = float(torch.cat([part.flatten() for part in parts]).norm()), clip / math.sqrt(BINS)
    left, slots = math.sqrt(BINS) * max(0.0, clip - norm), []
    for _ in range(BINS):
        slots.append(min(left, full))
        left -= slots[-1]
    return torch.cat([flat(parts, clip), parts[0].new_tensor(slots)])


def next_clip(style: str, clip: float, released: list[float]) -> float:
    """C of the next step, from what was released beside the gradient."""
    if style == "quantile":
        return clip * math.exp(-0.2 * (0.5 + released[0] / (0.2 * clip) - 0.5))
    shares = [value * math.sqrt(BINS) / clip for value in released]
    near_zero = min(1.0, max(0.0, shares[-1] / clip))
    return clip * math.exp(0.5 * (1 - (1 - near_zero) / 2 - shares[0]))


STYLES = {"flat": flat, "per_layer": per_layer, "automatic": automatic}
ADAPTED = {"quantile": quantile, "slaclip": slaclip}
"""Those that change C from step to step."""


@dataclass(frozen=True)
class Setting:
    """What a run is, whatever runs it.

    Attributes:
        style: of clipping.
        views: K of each example, 0 for the examples as they are.
        users: whether users are protected rather than examples.
        sigma: the noise multiplier.
        clip: the clip norm.
        batch: how many examples (or users) a step draws on average.
        most: how many examples of a user take part in a step.
        steps: how many are taken.
        examples: of the data set.
        seed: of all random numbers.
        lr: the learning rate.
        dtype: of the weights.
    """

    style: str = "flat"
    views: int = 0
    users: bool = False
    sigma: float = 0.7
    clip: float = 0.3
    batch: int = 4
    most: int = 3
    steps: int = 3
    examples: int = len(OWNERS)
    seed: int = 3
    lr: float = 0.5
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.style}-{self.views} views-{'users' if self.users else 'examples'}"


EVERY = [
    *(Setting(*of) for of in product(STYLES, (0, 3), (False, True))),
    Setting("quantile"),
    Setting("quantile", 3, True),
    Setting("slaclip", 3, False),
    Setting("slaclip", 0, True),
]
"""Each style with and without views, for examples and for users."""


def by_package(setting: Setting, engine: str, fit: Any = None, **options: Any) -> Tensor:
    """The weights after a run of the package.

    Args:
        setting: of the run.
        engine: which takes the steps.
        fit: makes the Trainer, from callbacks and options.
        options: further arguments of ``DifferentialPrivacy``.
    """
    if setting.users:
        options |= {"privacy_unit": OWNERS, "max_examples_per_unit": setting.most}
    private = DifferentialPrivacy(
        noise_multiplier=setting.sigma, clip_norm=setting.clip, seed=setting.seed, expected_batch_size=setting.batch,
        clipping=setting.style, automatic_gamma=GAMMA, engine=engine, **options,
    )  # fmt: skip
    views: list[L.Callback] = []
    if setting.views:
        views = [AugmentationMultiplicity(k=setting.views, transform=Shift(), images=0)]
    module = regressor(lr=setting.lr)
    precision = "64-true" if setting.dtype == torch.float64 else "32-true"
    (fit or trainer)(private, *views, max_steps=setting.steps, precision=precision).fit(
        module, loader(regression_data(setting.examples), batch_size=setting.batch)
    )
    return weights(module)


def by_hand(setting: Setting) -> Tensor:
    """The weights that it must come to, see Abadi et al. 2016, algorithm 1."""
    module, key = regressor().to(setting.dtype), RandomKey.from_seed(setting.seed)
    parameters, size = list(module.parameters()), max(OWNERS) + 1 if setting.users else setting.examples
    clipped, clip = {**STYLES, **ADAPTED}[setting.style], setting.clip
    for step in range(setting.steps):
        longest = clip * math.sqrt(1.01) if setting.style == "quantile" else clip
        total = torch.zeros_like(clipped([parameter.detach() for parameter in parameters], clip))
        for unit in poisson_sample(key.generator(Stream.SAMPLING, step), size, setting.batch / size).tolist():
            of_each = [torch.autograd.grad(loss, parameters) for loss in _losses(setting, module, key, step, unit)]
            mean = [sum(column[1:], column[0]) / len(of_each) for column in zip(*of_each, strict=True)]
            total += clipped(mean, clip)
        noise = key.generator(Stream.NOISE, step).standard_normal(len(total), dtype="float32")
        noisy = (total + setting.sigma * longest * torch.from_numpy(noise)) / setting.batch
        gradient, beside = noisy.split([len(weights(module)), len(noisy) - len(weights(module))])
        torch.nn.utils.vector_to_parameters(weights(module) - setting.lr * gradient, parameters)
        clip = next_clip(setting.style, clip, beside.tolist()) if setting.style in ADAPTED else clip
    return weights(module)


def _losses(setting: Setting, module: Regressor, key: RandomKey, step: int, unit: int) -> Iterator[Tensor]:
    """The loss of every view of every example of a unit in a step."""
    data = regression_data(setting.examples)
    for index in _examples(setting, key, step, unit):
        inputs, target = (tensor.to(setting.dtype) for tensor in data[index])
        seen = inputs[None]
        if setting.views:
            seed = int.from_bytes(key.derive(Stream.VIEWS, step, size=8), "big")
            seen = inputs + view_uniforms(seed, np.array([index]), setting.views, FEATURES)[0].to(setting.dtype)
        for view in seen:
            yield nn.functional.mse_loss(module.net(view).squeeze(-1), target)


def _examples(setting: Setting, key: RandomKey, step: int, unit: int) -> list[int]:
    """A drawn unit's examples: its one, or all of a user, or ``most`` of these chosen with numbers of the step and the user."""
    if not setting.users:
        return [unit]
    own = [index for index, owner in enumerate(OWNERS) if owner == unit]
    if len(own) <= setting.most:
        return own
    chosen = key.generator(Stream.UNITS, step, unit).choice(np.array(own), setting.most, replace=False, shuffle=False)
    return sorted(int(index) for index in chosen)
