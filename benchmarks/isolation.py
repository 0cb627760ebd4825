"""What it costs to see to it that nothing crosses from one example or step to another.

    uv run python benchmarks/isolation.py

A Trainer trains with the callback, and the time that goes into comparing and putting back state is added up within each step:
taking the contents of tensors and arrays, comparing them after the passes, and following what Python holds around each pass.
Prints the part of a step that it is; both come from the same steps, so load moves both.
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
from lightning_dp.step.kept_state import KeptState

spent = 0.0


def timed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its seconds added to ``spent``."""

    def call(*args: Any, **options: Any) -> Any:
        global spent
        begun = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            spent += time.perf_counter() - begun

    return call


def around(function: Callable[..., Any]) -> Callable[..., Any]:
    """The context of a pass, with the seconds of entering and leaving it added to ``spent``."""

    @contextmanager
    def call(*args: Any) -> Iterator[None]:
        context = function(*args)
        timed(context.__enter__)()
        try:
            yield
        finally:
            timed(context.__exit__)(None, None, None)

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


class Parts(L.Callback):
    """What part of each step goes into the state; of no user's, so that its own hooks are not watched."""

    def __init__(self) -> None:
        self.parts: list[float] = []
        self._begun = 0.0

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        global spent
        spent, self._begun = 0.0, time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End."""
        self.parts.append(spent / (time.perf_counter() - self._begun))


for hook in (Parts.on_train_batch_start, Parts.on_train_batch_end):
    hook.__module__ = "lightning_dp.benchmarks"


TASKS: dict[str, tuple[Callable[[], L.LightningModule], tuple[int, ...], int]] = {
    "digits": (lambda: DigitsCNN(), (1, 8, 8), 256),
    "WRN-16-4": (lambda: Module(WideResNet(16, 4)), (3, 32, 32), 32),
}
"""Name → the module, the shape of an image, and the batch size."""


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    KeptState.contents = timed(KeptState.contents)  # type: ignore[method-assign]  # to measure it
    Contents.changed = timed(Contents.changed)  # type: ignore[method-assign]  # likewise
    KeptState.put_back_after = around(KeptState.put_back_after)  # type: ignore[method-assign]  # likewise
    print("| | engine | part of a step, median |\n|---|---|---|")
    for name, (make, shape, batch) in TASKS.items():
        for engine in ("ghost", "vmap", "loop") if name == "digits" else ("ghost",):
            torch.manual_seed(0)
            parts = Parts()
            data = TensorDataset(torch.rand(4 * batch, *shape), torch.randint(10, (4 * batch,)))
            privacy = DifferentialPrivacy(noise_multiplier=1.0, seed=0, engine=engine)  # type: ignore[arg-type]  # a name
            trainer = L.Trainer(
                max_steps=steps + 2, callbacks=[privacy, parts], logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1,
            )  # fmt: skip
            trainer.fit(make(), DataLoader(data, batch_size=batch))
            print(f"| {name} | `{engine}` | {statistics.median(parts.parts[2:]):.2%} |")


if __name__ == "__main__":
    main()
