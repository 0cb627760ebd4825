"""What a training_step under manual optimization commands: backward passes and steps, intercepted rather than done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_dp.engines.late import at_hand
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import wrapped_optimizers
from lightning_dp.mechanism.instead import Instead

_ABSENT = object()


@dataclass
class Commands:
    """What has been commanded so far in one pass through training_step.

    Attributes:
        losses: what was given to ``manual_backward`` since the last optimizer step.
        steps: the optimizers that were told to step, by their place in ``configure_optimizers``, in order.
    """

    losses: list[Tensor] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)


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


@contextmanager
def intercepted(module: pl.LightningModule, on_step: Callable[[Commands, int], None]) -> Iterator[Commands]:
    """While open, ``manual_backward``, optimizers, schedulers and toggles of ``module`` do nothing but take notes.

    Args:
        module: under manual optimization, its optimizers set up.
        on_step: called at each ``optimizer.step()`` with the notes and the optimizer's place; the losses of the step are
            those since the step before it, and are forgotten afterwards.

    Raises:
        PreflightError: training_step steers training in a way that cannot be private, see the messages.
    """
    strategy = module.trainer.strategy
    notes = Commands()

    def backward(loss: Tensor, *_: Any, **__: Any) -> None:
        notes.losses.append(at_hand(loss))

    def step_of(place: int) -> Callable[..., Any]:
        def step(closure: Callable[[], Any] | None = None, **_: Any) -> Any:
            outcome = None if closure is None else closure()
            on_step(notes, place)
            notes.steps.append(place)
            notes.losses.clear()
            return outcome

        return step

    def nothing(*_: Any, **__: Any) -> None:
        return

    replacements: list[tuple[Any, str, Any]] = [
        (module, "manual_backward", backward),
        (module, "toggle_optimizer", nothing),
        (module, "untoggle_optimizer", nothing),
        (module, "clip_gradients", _no_clipping),
        (module, "zero_grad", nothing),
    ]
    for place, wrapped in enumerate(wrapped_optimizers(strategy)):
        replacements += [
            (wrapped, "step", step_of(place)),
            (wrapped, "zero_grad", nothing),
            (wrapped.optimizer, "step", _no_bare_step),
            (wrapped.optimizer, "zero_grad", nothing),
        ]
    for config in strategy.lr_scheduler_configs:
        replacements.append((config.scheduler, "step", _scheduler_step))
    with substituted(replacements):
        yield notes


@contextmanager
def substituted(replacements: list[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set instance attributes, given as (owner, name, value), while open."""
    found = [(owner, name, owner.__dict__.get(name, _ABSENT)) for owner, name, _ in replacements]
    try:
        for (owner, name, value), (_, _, before) in zip(replacements, found, strict=True):
            before = None if before is _ABSENT else before
            owner.__dict__[name] = Instead(owner, name, value, before) if isinstance(owner, nn.Module) else value
        yield
    finally:
        for owner, name, value in reversed(found):
            if value is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = value


def _no_clipping(*_: Any, **__: Any) -> NoReturn:
    raise PreflightError(
        "self.clip_gradients in training_step: expected none. A private gradient is clipped for every example and noisy "
        "when the optimizer gets it. Remove the call; the clip norm is DifferentialPrivacy(clip_norm=...)."
    )


def _no_bare_step(*_: Any, **__: Any) -> NoReturn:
    raise PreflightError(
        "an optimizer of torch stepped in training_step: expected Lightning's, from self.optimizers(). The step of an "
        "optimizer taken with use_pl_optimizer=False, or kept as an attribute, passes Lightning by, and no noise could be "
        "added. Use opt = self.optimizers() and opt.step()."
    )


def _scheduler_step(*metrics: Any, **named: Any) -> None:
    if any(isinstance(metric, Tensor) for metric in (*metrics, *named.values())):
        raise PreflightError(
            "scheduler.step(metric) in training_step: expected scheduler.step(). The metric is computed from private "
            "examples without noise and would steer training. Step on a validation metric in on_validation_epoch_end, and "
            "treat the validation data as public."
        )
