"""A private step as Lightning asks for it: training_step, backward, optimizer_step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer

from lightning_dp.engines.user_code import line_of_the_caller, no_end_of_the_data
from lightning_dp.errors import PreflightError
from lightning_dp.loading.loader import check_sample
from lightning_dp.step.objective import Objective
from lightning_dp.step.open_step import Opens, OpenStep
from lightning_dp.step.planned import Run
from lightning_dp.step.tally import Tally


class PrivateStep:
    """From a logical batch to a noisy gradient in ``p.grad``.

    Args:
        run: what was decided before the first step.
        objective: automatic or manual optimization.
        tally: counts over the steps.
        open_step: makes the open step of a sample; a replay watches what happens to it.
    """

    def __init__(self, run: Run, objective: Objective, tally: Tally, open_step: Opens = OpenStep) -> None:
        self.run, self.objective, self.tally, self.open_step = run, objective, tally, open_step

    def training_step(self, batch: Any, *rest: Any) -> STEP_OUTPUT:
        """Run the user's training_step on each example of the sample behind ``batch``.

        Raises:
            LogicalBatchConsumedError: the sample is not the one whose turn it is.
            PreflightError: training_step would end the run by what it sees.
        """
        planned = self.run.planned
        sample = planned.hooks.sample_behind(batch)
        check_sample(sample, planned.ledger.steps, self.tally.unused_samples)
        with no_end_of_the_data("training_step"):
            output = self.objective.training_step(self.open_step(self.run, sample, rest, self.tally))
        planned.logs.say_once_that_logs_are_private(self.run.log_train_metrics)
        return output

    def backward(self, loss: Tensor, **options: Any) -> Tensor:
        """See :meth:`lightning_dp.step.objective.Objective.backward`."""
        return self.objective.backward(self.run.planned, loss, **options)

    def step_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of an optimizer's step; under manual optimization it also brings that step's gradient.

        Raises:
            PreflightError: it is training_step that steps, in a pass over an example.
        """
        if self.run.planned.logs.is_listening and self.run.planned.module.automatic_optimization:
            line = line_of_the_caller()
            raise PreflightError(
                f"optimizer.step() in training_step{'' if line is None else f' ({line})'}: expected a training_step that "
                "returns its loss. Under automatic optimization Lightning steps, once, with the noisy gradient. To step by "
                "hand, set self.automatic_optimization = False."
            )
        return self.objective.step_closure(optimizer, closure)
