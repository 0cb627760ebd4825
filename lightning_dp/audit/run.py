"""One training run, with canaries, and what it says about ε."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_dp.audit.bound import check_confidence
from lightning_dp.audit.canaries import Canaries, WithCanaries, let_in, loader_with_canaries
from lightning_dp.audit.judge import judged
from lightning_dp.audit.observer import Observer
from lightning_dp.audit.result import AuditResult
from lightning_dp.callbacks.augmentation import AugmentationMultiplicity, views_of
from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.loading.columns import with_batch_size
from lightning_dp.loading.privacy_unit import PrivacyUnit
from lightning_dp.look.loader import check_loader
from lightning_dp.validate import number, whole

EXAMPLES_OF_A_USER = 2
"""So many examples a canary has that is a user."""

MOST_CANARIES = 10**7
"""Each gradient-space canary is one more coordinate of the gradient."""


def check_options(gradient_canaries: int, input_canaries: int, confidence: float, seed: int | None) -> None:
    """Raise ``ValueError`` unless :func:`audit` can work with these."""
    check_confidence(number("confidence", confidence))
    for name, count in (("gradient_canaries", gradient_canaries), ("input_canaries", input_canaries)):
        whole(name, count, low=0, high=MOST_CANARIES)
    if max(gradient_canaries, input_canaries) < 2:
        raise ValueError(
            f"gradient_canaries={gradient_canaries}, input_canaries={input_canaries}: expected at least two of one kind."
        )
    if seed is not None:
        whole("seed", seed, low=0)


def _check_processes(trainer: pl.Trainer, seed: int | None) -> None:
    """Raise ``ValueError`` unless every process can throw the same coins and sees whole releases."""
    if trainer.world_size == 1:
        return
    if isinstance(trainer.strategy, ModelParallelStrategy):
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} with world_size={trainer.world_size}: expected whole gradients on "
            "every rank. Audit with strategy='ddp', or on one device."
        )
    if seed is None:
        raise ValueError(
            f"seed=None with world_size={trainer.world_size}: expected a number, the same on every rank, so that all throw "
            "the same coins. Choose one that nothing else in the run depends on."
        )


def audit(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    train_dataloader: DataLoader[Any] | None = None,
    datamodule: pl.LightningDataModule | None = None,
    *,
    gradient_canaries: int = 2000,
    input_canaries: int = 200,
    confidence: float = 0.95,
    seed: int | None = None,
) -> AuditResult:
    """Train once with canaries among the data and bound ε from below by guessing which of them were in.

    The run is ``trainer.fit`` as ever, with the plan that it would have had without canaries: N and B, and so q, σ and
    the number of steps, are those of the user's data; the canaries that are in are drawn with the same q. Gradient-space
    canaries are attacked by someone who sees every released gradient (white box), input-space ones (one example's input
    with another's target) by someone who sees the model at the end (black box). Where users are protected, a canary is a
    user with examples of its own. Under manual optimization canaries are in the releases of every private optimizer.

    Args:
        trainer: with a :class:`~lightning_dp.DifferentialPrivacy` callback, on one device, or
            with ``"ddp"`` on several, whose processes all call this function and come to the same result.
        module: trained, and changed (:func:`lightning_dp.audit.canaries.let_in`): do not use it afterwards.
        train_dataloader: the training data, unless a datamodule or the module has them.
        datamodule: likewise.
        gradient_canaries: m₁; each is one more coordinate of every per-example gradient.
        input_canaries: m₂.
        confidence: of the lower bound.
        seed: of the coins; ``None`` for the operating system's entropy, on one device.

    Raises:
        ValueError: several devices without a seed or with shards, no privacy callback, no canary, input canaries under
            manual optimization, or a number out of range.

    Source: Steinke, Nasr and Jagielski (2023), arXiv 2305.08846.
    """
    check_options(gradient_canaries, input_canaries, confidence, seed)
    _check_processes(trainer, seed)
    private = next((one for one in trainer.callbacks if isinstance(one, DifferentialPrivacy)), None)  # type: ignore[attr-defined]  # set where type checkers do not see it
    if private is None:
        raise ValueError(
            "no DifferentialPrivacy among the Trainer's callbacks: expected one, whose claim is to be audited. Add it."
        )
    if not module.automatic_optimization and input_canaries:
        raise ValueError(
            f"input_canaries={input_canaries} with manual optimization: expected 0. What training_step does there is more "
            "than a loss that could be asked for. Audit by gradient canaries alone (--input-canaries 0)."
        )
    unit = private.privacy_unit
    observer = Observer(private)
    canaries: list[Canaries] = []
    generator = np.random.default_rng(seed)

    def with_canaries(loader: object) -> DataLoader[Any]:
        loader = check_loader(with_batch_size(loader))
        size = len(loader.dataset)  # type: ignore[arg-type]  # preflight saw that it has a length
        if not canaries:
            each = 1 if unit is None else EXAMPLES_OF_A_USER
            canaries.append(Canaries.draw(generator, gradient_canaries, input_canaries, size, each))
            units = None if unit is None else unit.read(loader.dataset)
            if units is not None:
                private.privacy_unit = PrivacyUnit(WithCanaries(loader.dataset, canaries[0]).users(units), units.most)
                private.privacy_unit.name = units.name
            private.dataset_size = private.dataset_size or (size if units is None else len(units))
            private.expected_batch_size = private.expected_batch_size or (loader.batch_size or 1) * trainer.world_size
        observer.loader = loader_with_canaries(loader, canaries[0])
        return observer.loader

    private.log_train_metrics = False
    trainer.callbacks.append(observer)  # type: ignore[attr-defined]  # set where type checkers do not see it
    given = None
    if train_dataloader is not None:
        given = with_canaries(train_dataloader)
    else:
        owner = module if datamodule is None else datamodule
        original = owner.train_dataloader
        owner.train_dataloader = lambda: with_canaries(original())  # type: ignore[method-assign]  # the audit's own loader, on purpose
    views = views_of(trainer)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set where type checkers do not see it
        if isinstance(callback, AugmentationMultiplicity) and callback.images is not None:
            inside = callback.images if isinstance(callback.images, tuple) else (callback.images,)
            callback.images = (0, *inside)  # the user's batch is the first of two now
    let_in(module, gradient_canaries, None if unit is not None else 1 if views is None else views.total)
    trainer.fit(module, train_dataloaders=given, datamodule=datamodule)
    if observer.loader is None or not canaries:
        raise ValueError(
            f"strategy={type(trainer.strategy).__name__} trained in processes that it started and ended: expected the scores "
            "in this one. Start them by torchrun, or audit on one device."
        )
    return judged(observer, canaries[0], private, confidence)
