"""A progress bar over all steps of a training, in a terminal and in a notebook."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from lightning_dp.validate import whole


class StepProgressBar(TQDMProgressBar):
    """One bar from the first step of a ``fit`` to the last, with ε spent so far and the time that is left.

    Lightning's own bars begin anew with each epoch. Under large batches an epoch has few steps, so such a bar says little about
    when a training ends; and the one that Lightning takes where rich is installed says ``Epoch 4/-2`` if only ``max_steps`` is
    given, and shows nothing in a notebook without ipywidgets. This one is made by ``tqdm``: a widget where ipywidgets is
    installed, a line of text elsewhere. It shows ``dp/epsilon``, and whatever the module logs with ``prog_bar=True``. It is for
    any Trainer, with or without :class:`~lightning_dp.DifferentialPrivacy`, and changes nothing but the screen.

    Args:
        refresh_rate: after how many steps the bar is drawn again; 0 draws none.

    Raises:
        ValueError: ``refresh_rate`` is no number of steps.
        TypeError: the Trainer is of ``pytorch_lightning``, which takes bars of its own root alone.

    Example:
        >>> import lightning as L
        >>> from lightning_dp import DifferentialPrivacy, StepProgressBar
        >>> callbacks = [DifferentialPrivacy(epsilon=8.0), StepProgressBar()]
        >>> trainer = L.Trainer(max_steps=875, callbacks=callbacks, logger=False)
    """

    def __init__(self, refresh_rate: int = 1) -> None:
        super().__init__(refresh_rate=whole("refresh_rate", refresh_rate, 0))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not isinstance(trainer, pl.Trainer):
            raise TypeError(
                "StepProgressBar with a Trainer of pytorch_lightning: expected one of lightning.pytorch, upon whose bar it is. "
                "Take pytorch_lightning.callbacks.TQDMProgressBar."
            )
        super().setup(trainer, pl_module, stage)

    @property
    @override
    def train_description(self) -> str:
        return "Steps"

    @override
    def on_train_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        super().on_train_start(trainer, *rest)
        bar = self.train_progress_bar
        bar.reset(total=_steps(trainer))
        bar.initial = bar.n = _taken(trainer)
        bar.refresh()

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, *rest: Any) -> None:
        """The bar goes on from epoch to epoch."""

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *rest: Any) -> None:
        bar, taken = self.train_progress_bar, _taken(trainer)
        if self.is_enabled and (taken % self.refresh_rate == 0 or taken == bar.total):
            bar.set_postfix(self.get_metrics(trainer, pl_module), refresh=False)
            bar.n = taken
            bar.refresh()

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.is_enabled:
            self.train_progress_bar.set_postfix(self.get_metrics(trainer, pl_module))
        super().on_train_end(trainer, pl_module)


def _taken(trainer: pl.Trainer) -> int:
    """How many batches, each of them one step, this training has had; those before a resume count."""
    return trainer.fit_loop.total_batch_idx + 1


def _steps(trainer: pl.Trainer) -> int | None:
    """How many it will have, ``None`` if nothing but time bounds them."""
    bounds = [] if trainer.max_steps == -1 else [trainer.max_steps]
    per_epoch = trainer.num_training_batches
    if trainer.max_epochs not in (None, -1) and per_epoch != float("inf"):
        bounds.append(int(per_epoch) * (trainer.max_epochs or 0))
    return min(bounds, default=None)
