"""training_step under manual optimization, run on a placeholder before training: who steps when, and who may not look."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from lightning_dp.errors import PreflightError
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.commands import Commands, intercepted
from lightning_dp.step.manual.global_step import counting_steps, global_step
from lightning_dp.step.undone import undone
from lightning_dp.step.user_loss import takes_batch_idx

DRY_RUN_BATCHES = 8
"""The dry run takes so many batches' worth of training_step: some modules step an optimizer at every n-th batch only."""


def check_private_step(place: int, losses: Sequence[Tensor], before: Sequence[int]) -> None:
    """Refuse a step of a private optimizer that is no release of its own.

    Args:
        place: the optimizer's place in ``configure_optimizers``.
        losses: given to ``manual_backward`` since the last step of any optimizer.
        before: the optimizers that have stepped in this training_step.

    Raises:
        PreflightError: see the message.
    """
    if not losses:
        raise PreflightError(
            f"optimizer {place} steps without a manual_backward since the last step: expected one of its own for each "
            "step. Two optimizers cannot share the gradient of one private loss; give their parameters to one optimizer, "
            "as parameter groups."
        )
    if place in before:
        raise PreflightError(
            f"optimizer {place} steps twice in one training_step: expected at most one step of each private optimizer for "
            "a batch. Every step is a release, and releases of one drawn sample are not amplified by sampling as if each had "
            "drawn its own: charged so, ε would be understated. For n steps of it to each step of another optimizer, take "
            "one in every training_step and step the other at every n-th batch (if batch_idx % n == 0): then every step "
            "draws a sample of its own and is charged for it."
        )


def dry_run(
    module: pl.LightningModule, capture: StepCapture, placeholder: Any, private: Sequence[int]
) -> list[list[int]]:
    """Which optimizers step at each of the first batches, in order. Nothing is optimized, logged or kept.

    Args:
        module: under manual optimization, its optimizers set up.
        capture: keeps logs and metrics out.
        placeholder: a batch without anybody's data.
        private: places of the private optimizers.

    Raises:
        PreflightError: training_step steers training in a way that cannot be private, see the messages.
    """
    scripts: list[list[int]] = []
    for index in range(DRY_RUN_BATCHES):
        taken = sum(map(len, scripts))
        scripts.append(_steps_at(module, capture, placeholder, index, private, taken=taken).script)
    return scripts


def check_no_pieces(
    module: pl.LightningModule,
    capture: StepCapture,
    one: Any,
    many: Any,
    index: int,
    taken: int,
    private: Sequence[int],
) -> None:
    """Refuse a training_step that gives the loss of a batch to ``manual_backward`` in pieces of the batch.

    Args:
        module: under manual optimization, its optimizers set up.
        capture: keeps logs and metrics out.
        one: a batch of one example without anybody's data.
        many: the same with several.
        index: of the batch at which to look.
        taken: how many optimizer steps come before it.
        private: places of the private optimizers.

    Raises:
        PreflightError: see the message.
    """
    try:
        alone, together = (_steps_at(module, capture, batch, index, (), taken=taken) for batch in (one, many))
    except Exception:
        return  # it takes examples in one number only, and so not in pieces; what is wrong besides, training will tell
    for place, a, b in zip(alone.script, alone.losses, together.losses, strict=False):
        lost = any(not math.isfinite(x) for x in a) and all(math.isfinite(x) for x in b)
        if place in private and (len(a) != len(b) or lost):
            found = f"{len(b)} times for a batch and {len(a)} for one example"
            raise PreflightError(
                f"training_step calls manual_backward {'with nan for one example' if len(a) == len(b) else found} before "
                f"the step of optimizer {place}: expected the loss of the whole batch, whatever its size. Gradients cannot be "
                "accumulated by hand over pieces of a batch: every example is a batch of its own, which has no pieces, and "
                "its gradient would be divided by their number. Call manual_backward once, with the mean over the batch, and "
                "limit memory with DifferentialPrivacy(physical_batch_size=...)."
            )


def check_public_steps(
    module: pl.LightningModule,
    capture: StepCapture,
    public: Sequence[int],
    placeholder: Any,
    example: Any,
    batches: list[tuple[int, int]],
) -> None:
    """Refuse a public optimizer whose gradient changes with the batch.

    In training a public step is given the placeholder, so that it *cannot* see the data; this tells the user beforehand that
    it would have wanted to.

    Args:
        module: under manual optimization, its optimizers set up.
        capture: keeps logs and metrics out.
        public: places of the optimizers said to be public.
        placeholder: a batch without anybody's data.
        example: a batch of the same shape with some. **Private**; only compared with the placeholder here.
        batches: numbers of the batches at which to look, and how many optimizer steps come before each.

    Raises:
        PreflightError: see the message.
    """
    for index, taken in batches:
        found = [
            _steps_at(module, capture, batch, index, (), public, taken).gradients for batch in (placeholder, example)
        ]
        for (place, without), (_, given) in zip(*found, strict=False):
            if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(without, given, strict=True)):
                raise PreflightError(
                    f"public_optimizers=[... {place} ...], yet the loss of optimizer {place} changes with the batch: expected "
                    "it to use no more of the batch than its shape. Its steps are neither clipped nor charged, and in "
                    "training get a batch of zeros. Draw what it needs at random (labels too), or leave optimizer "
                    f"{place} out of public_optimizers."
                )


@dataclass
class _Steps:
    """The steps taken at one batch, the losses before each, and the gradients of the optimizers asked for."""

    script: list[int]
    losses: list[list[float]] = field(default_factory=list)
    gradients: list[tuple[int, list[Tensor]]] = field(default_factory=list)


def _steps_at(
    module: pl.LightningModule,
    capture: StepCapture,
    batch: Any,
    index: int,
    private: Sequence[int],
    gradients_of: Sequence[int] = (),
    taken: int = 0,
) -> _Steps:
    optimizers, steps = module.trainer.optimizers, _Steps([])

    def on_step(notes: Commands, place: int) -> None:
        count()
        if place in private:
            check_private_step(place, notes.losses, notes.steps)
        steps.losses.append([float(loss.detach()) for loss in notes.losses])
        if place in gradients_of and notes.losses:
            held = [p for group in optimizers[place].param_groups for p in group["params"] if p.requires_grad]
            total = torch.stack([loss.reshape(()) for loss in notes.losses]).sum()
            given = torch.autograd.grad(total, held, retain_graph=True, allow_unused=True, materialize_grads=True)
            steps.gradients.append((place, list(given)))

    rest = (index,) if takes_batch_idx(module) else ()
    with (
        undone(module),
        torch.enable_grad(),
        counting_steps(module, global_step(module) + taken) as count,
        capture.listening(),
        intercepted(module, on_step) as notes,
        module.trainer.precision_plugin.train_step_context(),
    ):
        torch.manual_seed(index)
        module.training_step(batch, *rest)
    if notes.losses:
        raise PreflightError(
            "training_step calls manual_backward without a step of an optimizer after it: expected opt.step() in every "
            "training_step that has a loss. Gradients are not accumulated over batches: one batch is one private step, "
            "whatever its size. Raise the loader's batch_size, and limit memory with "
            "DifferentialPrivacy(physical_batch_size=...)."
        )
    steps.script = notes.steps
    return steps
