"""What it costs to hand examples over one at a time: microseconds an example, from the data set to the engine.

    OMP_NUM_THREADS=1 uv run python benchmarks/hand_over.py

A Trainer trains a small network with the callback, and the time for which the engine waits for its micro-batches is added up:
reading, seeding, collating, transfer hooks, and putting examples together. Cases take turns, and time is processor time, so
that load moves little; the first is tensors with torch's own functions, which nothing has to be kept apart for. Then the
digits recipe's whole step, with a ``collate_fn`` of one's own and vouched for, as a multiple of the step without one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.models import DigitsCNN
from lightning_dp.step.planned import Planned

COUNT, BATCH = 4096, 1024
IMAGES = torch.rand(COUNT, 1, 8, 8)
LABELS = torch.randint(10, (COUNT,))

spent, examples = 0.0, 0


class Records(Dataset[Any]):
    """A data set of one's own."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index], LABELS[index]


class Columns(Records):
    """As ``datasets.Dataset``: many are read at once."""

    def __getitems__(self, indices: list[int]) -> Any:
        return list(zip(IMAGES[indices], LABELS[indices], strict=True))


def collate(rows: list[Any]) -> Any:
    """As people write it."""
    return torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])


class Module(L.LightningModule):
    """A small network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross entropy."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooked(Module):
    """Scales its images on their way to the device."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Scaled."""
        return 2 * batch[0] - 1, batch[1]


class Started(Module):
    """Changes its batch where it starts."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Scaled."""
        batch[0].mul_(2).sub_(1)


CASES: dict[str, dict[str, Any]] = {
    "`TensorDataset`": {"data": TensorDataset(IMAGES, LABELS)},
    "own data set": {},
    "own `__getitems__`": {"data": Columns()},
    "own `__getitems__`, vouched for": {"data": Columns(), "row_wise": ["__getitems__"]},
    "own `collate_fn`": {"collate": collate},
    "own `collate_fn`, vouched for": {"collate": collate, "row_wise": ["collate_fn"]},
    "own `on_after_batch_transfer`": {"module": Hooked},
    "own `on_after_batch_transfer`, vouched for": {"module": Hooked, "row_wise": ["on_after_batch_transfer"]},
    "own `on_train_batch_start`, which changes its batch": {"module": Started},
    "own `collate_fn` and `on_after_batch_transfer`": {"collate": collate, "module": Hooked},
}


def waiting(original: Any) -> Any:
    """The micro-batches, with the seconds that they take added to ``spent``."""

    def micro_batches(self: Planned, batch: Any) -> Iterator[Any]:
        global spent, examples
        iterator = original(self, batch)
        while True:
            begun = time.process_time()
            found = next(iterator, None)
            spent += time.process_time() - begun
            if found is None:
                return
            examples += found[1]
            yield found

    return micro_batches


class Steps(L.Callback):
    """How long steps take; of no user's, so that its own hooks are not watched."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._begun = time.process_time()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.seconds.append(time.process_time() - self._begun)


for hook in (Steps.on_train_batch_start, Steps.on_train_batch_end):
    hook.__module__ = "lightning_dp.benchmarks"


def trained(
    steps: int, *, data: Any = None, collate: Any = None, module: type[L.LightningModule] = Module, **options: Any
) -> tuple[float, float]:
    """Microseconds that the engine waits for an example, and seconds of a step (median)."""
    global spent, examples
    torch.manual_seed(0)
    given = {"noise_multiplier": 1.0, "seed": 0, "physical_batch_size": 256, **options}
    times = Steps()
    trainer = L.Trainer(
        max_steps=steps + 1, callbacks=[DifferentialPrivacy(**given), times], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
    )  # fmt: skip
    loader = DataLoader(Records() if data is None else data, batch_size=BATCH, collate_fn=collate)
    spent, examples = 0.0, 0
    trainer.fit(module(), loader)
    return 1e6 * spent / max(examples, 1), statistics.median(times.seconds[1:])


def main() -> None:
    """Measure, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    Planned.micro_batches = waiting(Planned.micro_batches)
    found: dict[str, list[float]] = {name: [] for name in CASES}
    for _ in range(given.rounds):
        for name, case in CASES.items():
            found[name].append(trained(given.steps, **case)[0])
    first = statistics.median(found["`TensorDataset`"])
    print("| | µs an example | ÷ `TensorDataset` |\n|---|--:|--:|")
    for name, times in found.items():
        one = statistics.median(times)
        print(f"| {name} | {one:.1f} ({min(times):.1f}–{max(times):.1f}) | {one / first:.1f} |")
    digits: dict[str, dict[str, Any]] = {
        "torch's own": {},
        "own, vouched for": {"collate": collate, "row_wise": ["collate_fn"]},
        "own": {"collate": collate},
    }
    for engine in ("ghost", "vmap"):
        seconds: dict[str, list[float]] = {name: [] for name in digits}
        for _ in range(given.rounds):
            for name, case in digits.items():
                seconds[name].append(
                    trained(
                        given.steps, module=DigitsCNN, engine=engine,
                        data=TensorDataset(IMAGES, LABELS), **case,
                    )[1]
                )  # fmt: skip
        print(f"\n`{engine}`, a step of the digits recipe, as a multiple of that with torch's own collate function:")
        for name, times in seconds.items():
            ratios = [one / other for one, other in zip(times, seconds["torch's own"], strict=True)]
            print(f"| {name} | {statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f}) |")


if __name__ == "__main__":
    main()
