"""What it costs to see to it that nothing crosses from one example or step to another.

    uv run python benchmarks/isolation.py

A Trainer trains with the callback, and processor time is added up within each step:

- state: taking the contents of tensors and arrays, comparing them after the passes, and following what Python holds;
- hooks: all that lies around a hook of the module and one of a callback, both of which do next to nothing;
- comparison of one example with plain backward passes, in the steps that have one: about 2·(log T + γ − 1) of the first T.

Prints the part of a step that each is, the last over a run of 100 steps; all come from the same steps, so load moves all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.models import DigitsCNN, WideResNet
from lightning_dp.step.contents import Contents
from lightning_dp.step.engine_comparison import EngineComparison
from lightning_dp.step.kept_state import KeptState
from lightning_dp.step.user_hooks import UserHooks

spent: dict[str, float] = {}
under_way: list[str] = []


@contextmanager
def counted(name: str) -> Iterator[None]:
    """Adds processor time to that of ``name``, unless it is a part of something that is counted already."""
    begun = time.process_time()
    under_way.append(name)
    try:
        yield
    finally:
        under_way.pop()
        if not under_way:
            spent[name] = spent.get(name, 0.0) + time.process_time() - begun


def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its time added to that of ``name``."""

    def call(*args: Any, **options: Any) -> Any:
        with counted(name):
            return function(*args, **options)

    return call


def around(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The context of a pass, with the time of entering and leaving it added to that of ``name``."""

    @contextmanager
    def call(*args: Any) -> Iterator[None]:
        context = function(*args)
        timed(name, context.__enter__)()
        try:
            yield
        finally:
            timed(name, context.__exit__)(None, None, None)

    return call


class Module(L.LightningModule):
    """A network and its cross entropy."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The loss, logged as modules do."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Hooked(DigitsCNN):
    """With a hook that does next to nothing."""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note the number of the step."""
        self.number = self.trainer.global_step


class Counting(L.Callback):
    """A callback of a user's own, that does next to nothing."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Note the number of the step."""
        self.number = trainer.global_step


class Parts(L.Callback):
    """What each step takes, and what goes into each part; of no user's, so that its own hooks are not watched."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.parts: list[dict[str, float]] = []
        self._begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """One step is over, hooks and all, and the next begins."""
        now = time.process_time()
        if self._begun:
            self.steps.append(now - self._begun)
            self.parts.append(dict(spent))
        spent.clear()
        self._begun = now

    def part(self, name: str) -> float:
        """The median part of a step."""
        return statistics.median(
            parts.get(name, 0.0) / step for parts, step in zip(self.parts, self.steps, strict=True)
        )

    def amortised(self, name: str, steps: int = 100) -> float:
        """Of what only some steps have: the median of those, times how many there are of ``steps``, by the median step."""
        some = [parts[name] for parts in self.parts if name in parts]
        often = sum(2 / (step + 2) for step in range(steps)) / steps
        plain = [step - parts.get(name, 0.0) for parts, step in zip(self.parts, self.steps, strict=True)]
        return often * statistics.median(some or [0.0]) / statistics.median(plain)


Parts.on_train_batch_start.__module__ = "lightning_dp.benchmarks"


TASKS: dict[str, tuple[Callable[[], L.LightningModule], tuple[int, ...], int]] = {
    "digits, 256 in a batch": (lambda: DigitsCNN(), (1, 8, 8), 256),
    "digits, with hooks": (lambda: Hooked(), (1, 8, 8), 256),
    "WRN-16-4, 32 in a batch": (lambda: Module(WideResNet(16, 4)), (3, 32, 32), 32),
}
"""Name → the module, the shape of an image, and the batch size."""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    state, hooks, comparison = "state", "hooks", "comparison"
    KeptState.contents = timed(state, KeptState.contents)
    Contents.changed = timed(state, Contents.changed)
    KeptState.put_back_after = around(state, KeptState.put_back_after)
    UserHooks._run = timed(hooks, UserHooks._run)
    EngineComparison._compare = timed(comparison, EngineComparison._compare)
    print("| | engine | state | hooks | comparison |\n|---|---|--:|--:|--:|")
    for name, (make, shape, batch) in TASKS.items():
        for engine in ("ghost", "vmap", "loop") if name.startswith("digits") else ("ghost",):
            torch.manual_seed(0)
            parts = Parts()
            data = TensorDataset(torch.rand(4 * batch, *shape), torch.randint(10, (4 * batch,)))
            privacy = DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine=engine)
            more = [Counting()] if "hooks" in name else []
            trainer = L.Trainer(
                max_steps=steps + 2, callbacks=[privacy, parts, *more], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
            )  # fmt: skip
            trainer.fit(make(), DataLoader(data, batch_size=batch))
            parts.steps, parts.parts = parts.steps[1:], parts.parts[1:]  # the first is not yet warm
            found = f"{parts.part(state):.1%} | {parts.part(hooks):.1%} | {parts.amortised(comparison):.1%}"
            print(f"| {name} | `{engine}` | {found} |")


if __name__ == "__main__":
    main()
