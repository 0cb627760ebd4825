"""training_step under manual optimization, run on a stand-in before training: who steps when, and who may not look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_dp.manual.commands import Commands, intercepted
from lightning_dp.preflight import PreflightError
from lightning_dp.user_step.attributes import attributes_put_back
from lightning_dp.user_step.capture import StepCapture
from lightning_dp.user_step.example_loss import takes_batch_idx

REHEARSED = 8
"""So many batches' worth of training_step are rehearsed: some modules step an optimizer at every n-th batch only."""


@contextmanager
def parameters_put_back(module: pl.LightningModule) -> Iterator[None]:
    """Undo, when it closes, what was written into parameters and buffers, and what was frozen or thawed."""
    before = [(p, p.detach().clone(), p.requires_grad) for p in module.parameters()]
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value, requires_grad in before:
                parameter.copy_(value)
                parameter.requires_grad = requires_grad
            for buffer, value in buffers:
                buffer.copy_(value)


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
            "a batch. Every step is a release. To train it more often, step the others at every n-th batch."
        )


def rehearse(
    module: pl.LightningModule, capture: StepCapture, stand_in: Any, private: Sequence[int]
) -> list[list[int]]:
    """Which optimizers step at each of the first batches, in order. Nothing is optimized, logged or kept.

    Args:
        module: under manual optimization, its optimizers set up.
        capture: keeps logs and metrics out.
        stand_in: a batch without anybody's data.
        private: places of the private optimizers.

    Raises:
        PreflightError: training_step steers training in a way that cannot be private, see the messages.
    """
    return [_steps_at(module, capture, stand_in, index, private)[0] for index in range(REHEARSED)]


def check_public_steps(
    module: pl.LightningModule,
    capture: StepCapture,
    public: Sequence[int],
    stand_in: Any,
    example: Any,
    batches: list[int],
) -> None:
    """Refuse a public optimizer whose gradient changes with the batch.

    In training a public step is given the stand-in, so that it *cannot* see the data; this tells the user beforehand that
    it would have wanted to.

    Args:
        module: under manual optimization, its optimizers set up.
        capture: keeps logs and metrics out.
        public: places of the optimizers said to be public.
        stand_in: a batch without anybody's data.
        example: a batch of the same shape with some. **Private**; only compared with the stand-in here.
        batches: numbers of the batches at which to look.

    Raises:
        PreflightError: see the message.
    """
    for index in batches:
        found = [_steps_at(module, capture, batch, index, (), public)[1] for batch in (stand_in, example)]
        for (place, without), (_, given) in zip(*found, strict=False):
            if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(without, given, strict=True)):
                raise PreflightError(
                    f"public_optimizers=[... {place} ...], yet the loss of optimizer {place} changes with the batch: expected "
                    "it to use no more of the batch than its shape. Its steps are neither clipped nor charged, and in "
                    "training get a batch of zeros. Draw what it needs at random (labels too), or leave optimizer "
                    f"{place} out of public_optimizers."
                )


def _steps_at(
    module: pl.LightningModule,
    capture: StepCapture,
    batch: Any,
    index: int,
    private: Sequence[int],
    gradients_of: Sequence[int] = (),
) -> tuple[list[int], list[tuple[int, list[Tensor]]]]:
    """The steps taken at one batch, and the gradients of the optimizers asked for."""
    optimizers = module.trainer.optimizers
    gradients: list[tuple[int, list[Tensor]]] = []

    def on_step(notes: Commands, place: int) -> None:
        if place in private:
            check_private_step(place, notes.losses, notes.steps)
        if place in gradients_of and notes.losses:
            held = [p for group in optimizers[place].param_groups for p in group["params"] if p.requires_grad]
            total = torch.stack([loss.reshape(()) for loss in notes.losses]).sum()
            given = torch.autograd.grad(total, held, retain_graph=True, allow_unused=True, materialize_grads=True)
            gradients.append((place, list(given)))

    rest = (index,) if takes_batch_idx(module) else ()
    with (
        isolate_rng(),
        torch.enable_grad(),
        parameters_put_back(module),
        attributes_put_back(module, report=False),
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
    return notes.steps, gradients
