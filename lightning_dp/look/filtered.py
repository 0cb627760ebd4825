"""Where a filter of the gradients would not be what it says."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import either
from lightning_dp.plan.filtering import GradientFilter


def check_filter(rule: GradientFilter | None, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse a filter where there is not one gradient of one set of whole weights in a step.

    Raises:
        PreflightError: see the message.
    """
    if rule is None:
        return
    if not module.automatic_optimization:
        raise PreflightError(
            "gradient_filter='disk' with manual optimization: expected automatic optimization, where a step has one gradient, "
            "at the weights that the step before has left. Leave out gradient_filter, or optimize automatically."
        )
    if isinstance(trainer.strategy, either(ModelParallelStrategy)):
        raise PreflightError(
            "gradient_filter='disk' with sharded parameters: expected whole ones. It keeps the weights of the step before, and "
            "sharding of those is not done. Use strategy='ddp', or leave out gradient_filter."
        )
