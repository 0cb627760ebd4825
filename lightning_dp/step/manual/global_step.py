"""``trainer.global_step`` under manual optimization, which counts all optimizers' steps, also in a pass that takes none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl


def global_step(module: pl.LightningModule) -> int:
    """How many optimizer steps Lightning has counted."""
    return int(_progress(module).completed)


@contextmanager
def counting_steps(module: pl.LightningModule, began_at: int) -> Iterator[Callable[[], None]]:
    """While open, ``global_step`` is ``began_at``, and one more after each call of what is yielded.

    So a pass for the second step of a training_step reads before the first step what plain training would.
    """
    progress = _progress(module)
    before = progress.completed

    def count() -> None:
        progress.completed += 1

    try:
        progress.completed = began_at
        yield count
    finally:
        progress.completed = before


def _progress(module: pl.LightningModule) -> Any:
    return module.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
