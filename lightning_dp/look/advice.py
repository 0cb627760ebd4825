"""What is allowed, and should be known: decisions taken on numbers without noise, and optimizers that the noise blinds."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, StochasticWeightAveraging
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch.optim import Adam, AdamW, NAdam, Optimizer, RAdam
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


def advise_optimizers(optimizers: Sequence[Optimizer], public: Collection[int], noise_multiplier: float | None) -> None:
    """Say once, of a stock Adam that gets noisy gradients, that there is one that knows the noise.

    Args:
        optimizers: in the order of ``configure_optimizers``.
        public: places of those that get no noise.
        noise_multiplier: σ, or ``None`` where it is yet to be found.
    """
    private = [one for place, one in enumerate(optimizers) if place not in public]
    blind = [type(one).__name__ for one in private if type(one) in (Adam, AdamW, NAdam, RAdam)]
    if blind and noise_multiplier != 0:
        rank_zero_info(
            f"lightning_dp: {blind[0]} divides by the second moment of the gradient and its noise together, which is about "
            "the same everywhere: lightning_dp.optim.DPAdamW takes the noise's part off, at no cost in ε."
        )


def _warn(who: str, what: str, monitor: str) -> None:
    rank_zero_only(warn_user)(
        f"{who} decides {what} by a metric without noise, so the decision is not covered by the guarantee unless "
        f"{monitor!r} is computed from public data. Monitor a metric of public validation data, or leave it out."
    )
