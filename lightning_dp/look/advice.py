"""What is allowed, and should be known: decisions that are taken on numbers without noise."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.layers.batch_norm import batch_norms
from lightning_dp.lightning_internals import either


def check_decisions(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Warn of decisions that follow un-noised metrics, and refuse a pass over the data that no ledger would see.

    Args:
        trainer: its callbacks and schedulers are looked at.
        module: whether it has (frozen) BatchNorm decides about StochasticWeightAveraging.

    Raises:
        PreflightError: StochasticWeightAveraging would collect batch statistics of the private data.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set where type checkers do not see it
    for one in callbacks:
        if isinstance(one, either(EarlyStopping)):
            _warn(f"EarlyStopping(monitor={one.monitor!r})", "when training ends", one.monitor)
        if isinstance(one, either(StochasticWeightAveraging)) and batch_norms(module):
            raise PreflightError(
                "StochasticWeightAveraging with BatchNorm layers: expected a module without any. At the end Lightning would "
                "run all training examples through the module once more, to collect batch statistics without noise. Use "
                "ExponentialMovingAverage, or replace the layers with lightning_dp.make_trainable_privately(module)."
            )
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, ReduceLROnPlateau) and config.monitor:
            _warn(f"ReduceLROnPlateau(monitor={config.monitor!r})", "how training goes on", config.monitor)


def _warn(who: str, what: str, monitor: str) -> None:
    rank_zero_only(warn_user)(
        f"{who} decides {what} by a metric without noise, so the decision is not covered by the guarantee unless "
        f"{monitor!r} is computed from public data. Monitor a metric of public validation data, or leave it out."
    )
