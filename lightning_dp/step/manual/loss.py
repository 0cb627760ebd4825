"""An example's loss at one of the steps that training_step takes itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_dp.engines.protocol import LossFunction
from lightning_dp.errors import PreflightError
from lightning_dp.loading.form import ExampleForm
from lightning_dp.step.attributes import attributes_put_back
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.commands import Commands, intercepted
from lightning_dp.step.manual.global_step import counting_steps
from lightning_dp.step.manual.values_over_steps import PutBackInTime, ValuesOverSteps
from lightning_dp.step.user_loss import example_loss


class _ReachedError(BaseException):
    """The step whose gradient is wanted has been reached; not an Exception, so that no user's ``except`` stops it."""


@dataclass(frozen=True)
class Wanted:
    """The private step whose gradient is wanted.

    Attributes:
        rest: what Lightning passes to training_step after the batch.
        number: of the step among those of training_step, from 0.
        place: of its optimizer.
        parameters: of the optimizer, by name.
        began_at: ``global_step`` at the beginning of training_step.
    """

    rest: tuple[Any, ...]
    number: int
    place: int
    parameters: dict[str, nn.Parameter]
    began_at: int


def loss_up_to(
    form: ExampleForm,
    logs: StepCapture,
    wanted: Wanted,
    values: ValuesOverSteps | None = None,
) -> LossFunction:
    """An example's loss at the step that is wanted.

    What training_step makes before an earlier step it makes with the parameters of then.

    Args:
        form: how an example comes back to training_step.
        logs: takes what that logs and returns.
        wanted: the step.
        values: of the parameters over the steps of the training_step under way; ``None`` before the first.

    Raises:
        PreflightError: from the function, if an example takes another way than the placeholder.
    """
    module = form.module
    fixed = {name: p.detach() for name, p in module.named_parameters() if name not in wanted.parameters}
    time = PutBackInTime(module, ValuesOverSteps(module) if values is None else values, wanted.parameters)

    def up_to_the_step(call: Callable[[], Any]) -> dict[str, Any]:
        with counting_steps(module, wanted.began_at) as count, attributes_put_back(module, report=False):

            def on_step(notes: Commands, stepping: int) -> None:
                if len(notes.steps) == wanted.number:
                    if stepping != wanted.place or not notes.losses:
                        raise _other_way(wanted.number, wanted.place)
                    raise _ReachedError
                count()
                time.after(len(notes.steps) + 1)

            with intercepted(module, on_step) as notes:
                try:
                    call()
                except _ReachedError:
                    losses = [loss.reshape(()) for loss in notes.losses]
                    return {"loss": sum(losses[1:], losses[0]), "losses": losses}
        raise _other_way(wanted.number, wanted.place)

    return example_loss(form, logs, wanted.rest, fixed=fixed, run=up_to_the_step, begin_with=time.at_start)


def _other_way(number: int, place: int) -> PreflightError:
    return PreflightError(
        f"training_step does not come to step {number + 1}, of optimizer {place}, for an example as it does for a batch of "
        "zeros: expected the same steps in the same order for every batch. When to step may depend on batch_idx, never on "
        "the data. Remove the condition."
    )
