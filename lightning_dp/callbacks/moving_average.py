"""Parameter averaging: Lightning's WeightAveraging with the paper's warm-up."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from typing_extensions import override

from lightning_dp.callbacks.raw_validation import RawValidation
from lightning_dp.lightning_internals import WeightAveraging, average_of, own, root_of
from lightning_dp.look.trainer import check_averaging
from lightning_dp.mechanism.average import average, warmed_up_decay
from lightning_dp.validate import number, truth


class ExponentialMovingAverage(WeightAveraging):
    """Keep an exponential moving average of the parameters and validate, checkpoint and finish with it.

    After update t (counted from 1, one per optimizer step) the average is μ_t·average + (1−μ_t)·parameters with
    μ_t = min(decay, (1+t)/(10+t)), starting from the initial parameters (De et al. 2022, section 3 and their code). It
    reads only released parameters, so it costs no privacy. Buffers are copied, not averaged.

    Validation runs on the average; checkpoints hold it under ``state_dict`` (and the current parameters under
    ``current_model_state``, for resuming); when ``fit`` ends the module holds the average.

    Args:
        decay: μ in [0, 1); 0.999 per update suits runs of a thousand steps, 0.9 short fine-tuning.
        device: where to keep the average; ``None`` for the module's device.
        validate_raw: whether each validation during ``fit`` is preceded by one on the parameters as trained, whatever the
            module logs there being logged as ``<name>_raw`` too (``val/accuracy_raw``). It takes the time of a second
            validation; other callbacks and the loggers see one, with both sets of metrics at its end.

    Raises:
        ValueError: ``decay`` is outside [0, 1), or ``validate_raw`` is no truth value.
        PreflightError: while ``fit`` is being set up, if the parameters are sharded.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[ExponentialMovingAverage(0.999)], logger=False)
    """

    def __init__(
        self, decay: float = 0.999, device: torch.device | str | int | None = None, validate_raw: bool = False
    ) -> None:
        truth(validate_raw=validate_raw)
        if not 0 <= number("decay", decay) < 1:
            raise ValueError(f"decay={decay}: expected a number in [0, 1), such as 0.999.")
        self.decay = decay
        self._raw = RawValidation() if validate_raw else None
        super().__init__(device=device, use_buffers=False, avg_fn=self._average)

    def _average(self, averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        # AveragedModel counts the initial copy as the first model averaged, see setup(): the first update finds 1 here.
        return average(averaged, current, warmed_up_decay(self.decay, int(updates)))

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            check_averaging(trainer)
        own(root_of(trainer), pl.callbacks.WeightAveraging).setup(self, trainer, pl_module, stage)
        if stage == "fit":
            # AveragedModel would overwrite the initial parameters at its first update; the paper averages them in.
            average_of(self).n_averaged.fill_(1)

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._raw is not None:
            self._raw.begin(trainer)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_validation_epoch_end(trainer, pl_module)
        if self._raw is not None:
            self._raw.log(pl_module)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._raw is not None:
            self._raw.end(trainer)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self._raw is not None:
            self._raw.end(trainer)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "decay": self.decay}
