"""Where a filter of the gradients would not be what it says."""

from __future__ import annotations

import lightning.pytorch as pl

from lightning_dp.errors import PreflightError
from lightning_dp.plan.filtering import GradientFilter
from lightning_dp.ranks.world import world_of


def check_filter(rule: GradientFilter | None, trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Refuse a filter where a step has not one gradient, or cannot take it at two sets of weights.

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
    if world_of(trainer.strategy).gather == "layer":
        raise PreflightError(
            "gradient_filter='disk' with gather='layer': expected gather='step'. Only the engine ghost brings single layers "
            "together, and its layers see one set of weights in a step, while the filter takes gradients at two."
        )
