"""What each mechanism and optimizer is worth at the same ε: tuned alike, five seeds, a paired test against tuned SGD.

    uv run python benchmarks/mechanisms.py --task digits --results runs.jsonl
    LIGHTNING_DP_DATA=folder/of/cifar10-jpeg.tar.xz uv run python benchmarks/mechanisms.py --task features --results runs.jsonl
    uv run python benchmarks/mechanisms.py --table --results runs.jsonl

Tasks: handwritten digits (8x8 images, a network of one hidden layer), and CIFAR-10 (JPEG) seen through a fixed scattering
transform, averaged to 2x2 places (a linear classifier on 972 features, normalised example by example).

Every method gets the same privacy (ε, δ), expected batch size and steps, and the same number of tries: its rates, all tried on
a public split (a part of the training data that nothing else is trained on), at the noise multiplier of the private run. The
best is then trained on the private split from five seeds and scored on the test data. A seed fixes initial weights, sampling
and noise. The test is a paired t-test over seeds against tuned SGD. A line of JSON is appended for each run; what is there
is not run again, so an interrupted measurement goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.mixing import MixSelf
from lightning_dp.batches.transforms import Crop

EPSILONS, DELTA, SEEDS = (1.0, 3.0, 8.0), 1e-5, 5


@dataclass(frozen=True)
class Task:
    """Data, a network, and the plan that every method shares."""

    make: Callable[[], nn.Module]
    public: tuple[TensorDataset, TensorDataset]
    private: tuple[TensorDataset, TensorDataset]
    batch: int
    steps: int
    images: bool
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Method:
    """What is different from SGD with momentum.

    Attributes:
        optimizer: of parameters and a rate.
        rates: that are tried; ``None`` for those of the task, which are for SGD.
        private: arguments of ``DifferentialPrivacy``.
        callbacks: that go with it.
        scale: what the task's rates are multiplied with. A clip norm that is adapted makes gradients longer.
        images: whether it needs images.
    """

    optimizer: Callable[[Any, float], torch.optim.Optimizer]
    rates: tuple[float, ...] | None = None
    private: dict[str, Any] = field(default_factory=dict)
    callbacks: Callable[[], list[L.Callback]] = list
    images: bool = False
    scale: float = 1.0


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """What all others are compared with."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def of(name: str, **options: Any) -> Callable[[Any, float], torch.optim.Optimizer]:
    """An optimizer of :mod:`lightning_dp.optim`, or of torch."""

    def make(parameters: Any, lr: float) -> torch.optim.Optimizer:
        import lightning_dp.optim as own

        kind = getattr(own, name, None) or getattr(torch.optim, name)
        made: torch.optim.Optimizer = kind(parameters, lr=lr, **options)
        return made

    return make


ADAPTIVE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
METHODS = {
    "SGD": Method(sgd),
    "Adam": Method(of("Adam"), ADAPTIVE),
    "DPAdamW": Method(of("DPAdamW"), ADAPTIVE),
    "DPMicroAdam": Method(of("DPMicroAdam"), ADAPTIVE),
    "DPMuon": Method(of("DPMuon"), ADAPTIVE),
    "DiSK": Method(sgd, None, {"gradient_filter": "disk"}),
    "quantile clipping": Method(sgd, None, {"clipping": "quantile"}, scale=1 / 16),
    "SlaClip": Method(sgd, None, {"clipping": "slaclip"}, scale=1 / 16),
    "automatic clipping": Method(sgd, None, {"clipping": "automatic"}),
    "banded noise": Method(sgd, None, {"noise": "banded", "sampling": "cyclic_poisson"}),
    "lambda noise": Method(sgd, None, {"noise": "lambda", "sampling": "balls_in_bins"}),
    "BISR noise": Method(sgd, None, {"noise": "bisr", "sampling": "balls_in_bins"}),
    "random allocation": Method(sgd, None, {"sampling": "random_allocation"}),
    "balls in bins": Method(sgd, None, {"sampling": "balls_in_bins"}),
    "4 views": Method(sgd, None, callbacks=lambda: [views()], images=True),
    "4 + 4 mixed views": Method(sgd, None, callbacks=lambda: [views(MixSelf(4))], images=True),
}


def views(*mix: MixSelf) -> L.Callback:
    """Four views, shifted by a pixel at most."""
    return AugmentationMultiplicity(4, Crop(padding=1), images=0, mix=mix)


class Classifier(L.LightningModule):
    """A network, its loss and its optimizer; nothing about privacy."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__()
        self.net, self.optimizer = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        features, labels = batch
        return F.cross_entropy(self.net(features), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The method's."""
        return self.optimizer(self.parameters())


@cache
def task(name: str) -> Task:
    """The data of a task, read once."""
    return digits() if name == "digits" else features()


def digits() -> Task:
    """1,797 digits: 450 public, 1,078 private, 269 to test on."""
    from lightning_dp.data import DigitsDataModule

    data = DigitsDataModule()
    data.setup()
    x, y = (torch.cat(parts) for parts in zip(data.train_set.tensors, data.val_set.tensors, strict=True))
    public, private, test = _split(x, y, (450, 1078, 269))

    def make() -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))

    return Task(
        make, _halves(public, 300), (private, test), 256, 80, images=True, rates=(0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    )


def features() -> Task:
    """CIFAR-10 (JPEG): 12,000 images public, 38,000 private, the 10,000 test images."""
    from lightning_dp.data import FixedFeatures, ImageFolderDataModule
    from lightning_dp.models import Scattering2d

    images = ImageFolderDataModule(
        root="cifar10-jpeg.tar.xz", num_classes=10, size=32, val="test", mean=[0.0] * 3, std=[1.0] * 3
    )
    net = nn.Sequential(Scattering2d(size=32, scales=2, angles=8), nn.AvgPool2d(4))
    data = FixedFeatures(images, net)
    data.prepare_data()
    sets: list[Any] = [data.train_set, data.test_set]
    (x, y), (test_x, test_y) = ((one.features.float(), torch.tensor(one.labels)) for one in sets)
    public, private = _split(x, y, (12000, 38000))

    def make() -> nn.Module:
        return nn.Sequential(nn.GroupNorm(27, 243, affine=False), nn.Flatten(), nn.Linear(972, 10))

    return Task(
        make,
        _halves(public, 9000),
        (private, TensorDataset(test_x, test_y)),
        2048,
        100,
        images=False,
        rates=(0.8, 1.6, 3.2, 6.4, 12.8, 25.6),
    )


def _split(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> list[TensorDataset]:
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(x)))
    return [TensorDataset(x[part], y[part]) for part in order.split(list(sizes))]


def _halves(data: TensorDataset, first: int) -> tuple[TensorDataset, TensorDataset]:
    return TensorDataset(*(t[:first] for t in data.tensors)), TensorDataset(*(t[first:] for t in data.tensors))


def fit(
    module: Classifier, private: DifferentialPrivacy, train: TensorDataset, of_task: Task, *callbacks: L.Callback
) -> None:
    """Train in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_steps=of_task.steps,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[private, *callbacks],
        )
        trainer.fit(module, DataLoader(train, batch_size=of_task.batch, shuffle=True))


def classifier(task_name: str, method_name: str, rate: float, seed: int) -> Classifier:
    """With the initial weights of a seed."""
    torch.manual_seed(seed)
    return Classifier(task(task_name).make(), lambda parameters: METHODS[method_name].optimizer(parameters, rate))


def run(task_name: str, method_name: str, epsilon: float, rate: float, seed: int, *, tuning: bool) -> dict[str, Any]:
    """Train once and score."""
    of_task, method = task(task_name), METHODS[method_name]
    train, test = of_task.public if tuning else of_task.private
    module = classifier(task_name, method_name, rate, seed)
    options: dict[str, Any] = {"delta": DELTA, "clip_norm": 1.0, "expected_batch_size": of_task.batch, **method.private}
    if tuning:  # by Poisson sampling with independent noise, as large as in the private run
        options = {name: value for name, value in options.items() if name not in ("sampling", "noise")}
        options["noise_multiplier"] = sigma(task_name, method_name, epsilon)
        options["expected_batch_size"] = min(of_task.batch, len(train) - 1)
    else:
        options["epsilon"] = epsilon
    started = time.perf_counter()
    private = DifferentialPrivacy(seed=1000 + seed, **options)
    fit(module, private, train, of_task, *method.callbacks())
    with torch.no_grad():
        predicted = module.net(test.tensors[0]).argmax(1)
    ledger = private.ledger
    assert ledger is not None
    return {
        "task": task_name,
        "method": method_name,
        "epsilon": epsilon,
        "rate": rate,
        "seed": seed,
        "tuning": tuning,
        "accuracy": float((predicted == test.tensors[1]).double().mean()),
        "spent": ledger.epsilon().epsilon,
        "noise_multiplier": ledger.plan.mechanism.noise.noise_multiplier,
        "seconds": round(time.perf_counter() - started, 1),
    }


class _StopAtOnce(L.Callback):
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.should_stop = True


@cache
def sigma(task_name: str, method_name: str, epsilon: float) -> float:
    """The noise multiplier of the private run of a method, which is planned and not made."""
    of_task, method = task(task_name), METHODS[method_name]
    private = DifferentialPrivacy(
        epsilon=epsilon, delta=DELTA, clip_norm=1.0, expected_batch_size=of_task.batch, seed=0, **method.private
    )
    fit(classifier(task_name, method_name, 0.1, 0), private, of_task.private[0], of_task, _StopAtOnce())
    assert private.ledger is not None
    return private.ledger.plan.mechanism.noise.noise_multiplier


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard deviation in %, the difference to SGD, and the p of a paired t-test."""
    lines = []
    for name in dict.fromkeys(one["task"] for one in results):
        for epsilon in EPSILONS:
            runs = [one for one in results if (one["task"], one["epsilon"], one["tuning"]) == (name, epsilon, False)]
            found = {
                method: {one["seed"]: 100 * one["accuracy"] for one in runs if one["method"] == method}
                for method in METHODS
            }
            rates = {one["method"]: one["rate"] for one in runs}
            if not found["SGD"]:
                continue
            lines += [f"\n**{name}, ε = {epsilon:g}**\n", "| method | rate | accuracy, % | minus SGD | p |"]
            lines.append("|---|---|---|---|---|")
            for method, by_seed in found.items():
                if len(by_seed) < 2:
                    continue
                seeds = sorted(set(by_seed) & set(found["SGD"]))
                pairs = [by_seed[seed] - found["SGD"][seed] for seed in seeds]
                mean, spread = statistics.mean(by_seed.values()), statistics.stdev(by_seed.values())
                same = method == "SGD"
                p = "" if same else f"{stats.ttest_1samp(pairs, 0.0).pvalue:.3g}"
                difference = "" if same else f"{statistics.mean(pairs):+.2f}"
                lines.append(f"| {method} | {rates[method]:g} | {mean:.2f} ± {spread:.2f} | {difference} | {p} |")
    return "\n".join(lines)


def main() -> None:
    """Tune and run what is not there yet, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits", "features"], default="digits")
    parser.add_argument("--methods", nargs="*", choices=[*METHODS], default=[*METHODS])
    parser.add_argument("--epsilons", nargs="*", type=float, default=[3.0, 1.0, 8.0])
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    results = [json.loads(line) for line in given.results.read_text().splitlines()] if given.results.is_file() else []
    if given.table:
        print(table(results))
        return

    def made(method: str, epsilon: float, rate: float, seed: int, *, tuning: bool) -> dict[str, Any]:
        key = {"task": given.task, "method": method, "epsilon": epsilon, "rate": rate, "seed": seed, "tuning": tuning}
        there = next((one for one in results if all(one[name] == value for name, value in key.items())), None)
        if there is not None:
            return there
        one = run(given.task, method, epsilon, rate, seed, tuning=tuning)
        results.append(one)
        with given.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(one) + "\n")
        print(json.dumps(one), flush=True)
        return one

    for epsilon in given.epsilons:
        for method in given.methods:
            if METHODS[method].images and not task(given.task).images:
                continue
            rates = METHODS[method].rates or [METHODS[method].scale * rate for rate in task(given.task).rates]
            tried = [made(method, epsilon, rate, 100, tuning=True) for rate in rates]
            best = max(tried, key=lambda one: float(one["accuracy"]))["rate"]
            for seed in range(SEEDS):
                made(method, epsilon, best, seed, tuning=False)


if __name__ == "__main__":
    main()
