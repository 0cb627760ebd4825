"""What of the Trainer cannot be honoured, and its strategy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lightning_dp.engines.user_code import library_that_calls
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import LIGHTNING, either, refused_of_ddp, root_of, version_of
from lightning_dp.look.module import check_module
from lightning_dp.validate import whole

SUPPORTED_PRECISION = ("32-true", "64-true", "bf16-mixed", "bf16-true")


def check_before_setup(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """:func:`check_trainer`, and :func:`check_module` as far as its layers are there."""
    check_trainer(trainer)
    check_module(module, complete=False)


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse Trainer settings that differential privacy cannot honour. Called when ``fit`` is being set up.

    Raises:
        PreflightError: see the message.
    """
    check_root(trainer)
    for name in ("max_steps", "max_epochs"):
        try:
            whole(name, -1 if (limit := getattr(trainer, name)) is None else limit, low=-1)
        except ValueError as error:
            raise PreflightError(
                f"{error} The noise is planned for all steps to come: give a whole number, or -1 for no limit."
            ) from None
    if trainer.gradient_clip_val:
        library = library_that_calls()
        where = (
            f"Here {library} makes or runs the Trainer: have it pass gradient_clip_val=None on to it, as with "
            "trainer_kwargs={'gradient_clip_val': None}"
            if library
            else "Leave it out of Trainer(...), or give None; where a library makes the Trainer, as GluonTS's estimators do, "
            "give trainer_kwargs={'gradient_clip_val': None} or what it calls that"
        )
        raise PreflightError(
            f"gradient_clip_val={trainer.gradient_clip_val}, an argument of the Trainer: expected None or 0. It would clip the "
            f"gradient that is already clipped per example and noisy. {where}. The clip norm is "
            "DifferentialPrivacy(clip_norm=...)."
        )
    if trainer.accumulate_grad_batches != 1 or _has(trainer, GradientAccumulationScheduler):
        raise PreflightError(
            f"accumulate_grad_batches={trainer.accumulate_grad_batches}: expected 1 (and no "
            "GradientAccumulationScheduler). One Lightning batch is one private step, whatever its size: raise the "
            "loader's batch_size, and limit memory with DifferentialPrivacy(physical_batch_size=...)."
        )
    settings: Any = trainer  # Lightning sets overfit_batches where type checkers do not see it
    if settings.overfit_batches:
        raise PreflightError(
            f"overfit_batches={settings.overfit_batches}: expected 0. It replaces the training sampler by one that "
            "always takes the same examples. Train on a torch.utils.data.Subset instead."
        )
    if trainer.precision not in SUPPORTED_PRECISION:
        raise PreflightError(
            f"precision={trainer.precision!r}: expected one of {', '.join(SUPPORTED_PRECISION)}. Loss scaling and the "
            "narrow range of fp16 turn gradients into inf before they can be clipped; use 'bf16-mixed'."
        )
    check_averaging(trainer)
    if _has(trainer, LearningRateFinder) or _has(trainer, BatchSizeFinder):
        raise PreflightError(
            "Tuner (LearningRateFinder or BatchSizeFinder): expected none together with DifferentialPrivacy. Every "
            "trial run reads the private data and spends budget that no ledger counts. Tune on public data, or set the "
            "value by hand."
        )


def check_root(trainer: pl.Trainer) -> None:
    """Refuse a ``pytorch_lightning`` of another version than ``lightning``, whose hooks and strategies are used from within.

    Raises:
        PreflightError: see the message.
    """
    root = root_of(trainer)
    found, wanted = version_of(root), version_of(LIGHTNING)
    if found.split(".")[:2] != wanted.split(".")[:2]:
        raise PreflightError(
            f"a Trainer of {root}=={found}: expected the version of lightning, which is {wanted}. Install "
            f"pytorch-lightning=={wanted}, or import the Trainer and the module from lightning.pytorch."
        )


def check_averaging(trainer: pl.Trainer) -> None:
    """Refuse an average of sharded weights, which Lightning makes by copying the whole module.

    Raises:
        PreflightError: see the message.
    """
    if isinstance(trainer.strategy, either(ModelParallelStrategy)) and _has(trainer, WeightAveraging):
        raise PreflightError(
            "ExponentialMovingAverage or another WeightAveraging with sharded parameters: expected neither together. "
            "Lightning copies the module for it, and FSDP2 forbids that. Use strategy='ddp', or train without an average."
        )


def check_strategy(strategy: Strategy, convertible: tuple[type[Strategy], ...]) -> None:
    """Refuse strategies that have no private twin.

    Raises:
        PreflightError: see the message.
    """
    if type(strategy) not in convertible:
        raise PreflightError(
            f"strategy={type(strategy).__module__}.{type(strategy).__name__}: expected Lightning's single-device, DDP "
            "or ModelParallelStrategy itself. Use strategy='auto', 'ddp', 'private' or 'private_ddp', and for sharded "
            "parameters 'private_fsdp' with fully_shard in configure_model; DeepSpeed, FSDPStrategy (FSDP1) and XLA shard "
            "gradients before they could be clipped per example."
        )
    hooks = refused_of_ddp(strategy) if isinstance(strategy, either(DDPStrategy)) else []
    if hooks:
        raise PreflightError(
            f"DDPStrategy({hooks[0]}=...): expected none. The ranks' clipped gradients are added up once "
            "a step without DistributedDataParallel, so it would never run. Remove it."
        )


def _has(trainer: pl.Trainer, callback: type[pl.Callback]) -> bool:
    return any(isinstance(one, either(callback)) for one in trainer.callbacks)  # type: ignore[attr-defined]  # set where type checkers do not see it
