"""How many private steps a fit takes: as many as it would take batches without privacy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from lightning_dp.engines.user_code import warn_user
from lightning_dp.plan.privacy_plan import PrivacyPlan

ONCE = (0.5, 2.0)
"""What an epoch without privacy can come to in draws of each example: with drop_last next to a half, without next to two."""


@dataclass(frozen=True)
class Progress:
    """How far a Trainer has come when a fit begins.

    Attributes:
        optimizer_steps: ``global_step``.
        epochs: how many are over.
        batches: how many of an epoch had been taken when a checkpoint was saved in the middle of it. If those are all
            batches of an epoch, the next one begins at its first.
    """

    optimizer_steps: int = 0
    epochs: int = 0
    batches: int = 0

    @classmethod
    def of(cls, trainer: pl.Trainer) -> Progress:
        """Of a Trainer without a checkpoint: an epoch that an earlier fit left in the middle counts as over, or not at all."""
        over: Any = trainer.fit_loop.epoch_progress.current  # Lightning annotates a class without `processed`
        return cls(trainer.global_step, over.processed)

    @classmethod
    def in_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Progress:
        """Of what ``fit(ckpt_path=...)`` goes on with. A checkpoint without loops is one of weights: nothing has been done."""
        loop = checkpoint.get("loops", {}).get("fit_loop", {})
        epoch = loop.get("epoch_progress", {}).get("current", {})
        batches = loop.get("epoch_loop.batch_progress", {})
        epochs = epoch.get("processed", checkpoint.get("epoch", 0))
        if all(epoch.get(name, epochs) == epochs for name in ("ready", "started")):
            return cls(checkpoint["global_step"], epochs)
        taken, was_last = batches.get("current", {}).get("ready", 0), batches.get("is_last_batch", False)
        return cls(checkpoint["global_step"], epochs + was_last, taken)


def planned_steps(
    trainer: pl.Trainer, batches_per_epoch: int, at_start: Progress, optimizer_steps_per_batch: int = 1
) -> int | None:
    """How many further private steps ``fit`` will take, or ``None`` if nothing but time bounds them.

    Args:
        trainer: its ``max_steps``, ``max_epochs`` and ``limit_train_batches`` are read.
        batches_per_epoch: the length of the training loader, as Lightning has prepared it for this rank.
        at_start: what was done before this ``fit``.
        optimizer_steps_per_batch: the fewest optimizer steps in a batch; more than 1 under manual optimization, where
            ``max_steps`` counts the steps of all optimizers and one batch is one private step.
    """
    bounds = []
    if trainer.max_steps != -1:
        before = at_start.optimizer_steps // optimizer_steps_per_batch
        bounds.append(math.ceil(trainer.max_steps / optimizer_steps_per_batch) - before)
    if trainer.max_epochs is not None and trainer.max_epochs != -1:
        per_epoch = limited(batches_per_epoch, trainer.limit_train_batches)
        left = trainer.max_epochs - at_start.epochs
        bounds.append(left * per_epoch - (at_start.batches if at_start.batches < per_epoch else 0))
    return max(0, min(bounds)) if bounds else None


def ends_by_epochs(trainer: pl.Trainer, remaining_steps: int | None) -> bool:
    """Whether how many steps are taken follows from how many batches an epoch has, as far as can be told; if in doubt, yes.

    Args:
        trainer: whose bounds these are.
        remaining_steps: of :func:`planned_steps`.
    """
    if remaining_steps is None or trainer.max_epochs in (None, -1):
        return False
    return trainer.max_steps == -1 or remaining_steps < trainer.max_steps - trainer.global_step


def limited(batches: int, limit: int | float) -> int:
    """How many of ``batches`` are left by ``limit_train_batches``: a number of them, or a part.

    Example:
        >>> limited(7, 3), limited(7, 0.5), limited(7, 1.0)
        (3, 3, 7)
    """
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def check_draws_in_an_epoch(trainer: pl.Trainer, plan: PrivacyPlan, loader: DataLoader[Any]) -> None:
    """Warn where epochs end the run and are not what they are taken for: each example drawn about once.

    Args:
        trainer: its ``max_steps`` and ``max_epochs`` are read.
        plan: the real one, where it is simulated.
        loader: the user's, as Lightning has prepared it.
    """
    steps = len(loader)
    draws = steps * plan.sampling_probability
    by_epochs = trainer.max_epochs not in (None, -1) and not 0 <= trainer.max_steps < (trainer.max_epochs or 0) * steps
    if not by_epochs or ONCE[0] <= draws <= ONCE[1]:
        return
    fitting = max(1, round((loader.batch_size or 1) * draws))
    rank_zero_only(warn_user)(
        f"max_epochs={trainer.max_epochs} with expected_batch_size={plan.expected_batch_size:g}: an epoch is "
        f"len(train_dataloader) = {steps} steps, in which each {plan.unit} is drawn {draws:.3g} times on average: expected "
        f"about once. Give the loader batch_size={fitting}, or say the end in steps, as in Trainer(max_steps=...)."
    )


LIGHTNINGS_EPOCHS = 1000
"""What Lightning takes for ``max_epochs`` if neither ``max_steps`` nor ``max_epochs`` nor ``max_time`` is given."""


def check_end_was_given(trainer: pl.Trainer, plan: PrivacyPlan) -> None:
    """Warn where the run is planned for the thousand epochs of a Trainer that was told no end.

    Lightning does not keep whether it was told. Who wants a thousand epochs can say so in steps.

    Args:
        trainer: its ``max_steps`` and ``max_epochs`` are read.
        plan: of this fit.
    """
    if trainer.max_steps != -1 or trainer.max_epochs != LIGHTNINGS_EPOCHS or plan.steps is None:
        return
    noise = "was found for" if plan.target_epsilon is not None else "is added in"
    rank_zero_only(warn_user)(
        f"max_epochs={LIGHTNINGS_EPOCHS}, which Lightning sets when neither max_steps nor max_epochs is given: the plan is T = "
        f"{plan.steps} steps, and the noise σ = {plan.noise_multiplier:.4g} {noise} all of them. Expected the end that is "
        f"meant, in Trainer(max_steps=...) or Trainer(max_epochs=...). If it is this one, give max_steps={plan.steps}."
    )
