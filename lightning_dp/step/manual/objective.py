"""Manual optimization: the user's training_step runs once on a batch that holds nobody's data, and steers.

Where it tells a private optimizer to step, the gradient of that step is found from the sample: training_step runs for each
example, up to that very ``step()``, and what it gave to ``manual_backward`` since the step before is the example's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from lightning_dp.engines.accumulate import Accumulated
from lightning_dp.engines.late import at_hand
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.loading.form import ExampleForm
from lightning_dp.mechanism.complex import as_complex_like
from lightning_dp.optim.noise_std import tell_noise_std
from lightning_dp.step.logs import Recording
from lightning_dp.step.manual.commands import check_private_step
from lightning_dp.step.manual.global_step import global_step
from lightning_dp.step.manual.late_logs import KnownLoss, in_place_of, log_late
from lightning_dp.step.manual.loss import Wanted, loss_up_to
from lightning_dp.step.manual.script import Script, held_by_optimizers
from lightning_dp.step.manual.values_over_steps import ValuesOverSteps
from lightning_dp.step.objective import Losses
from lightning_dp.step.open_step import OpenStep
from lightning_dp.step.parameter_hooks import put_gradient
from lightning_dp.step.planned import Planned

Key = tuple[int, frozenset[str]]
"""A private optimizer's place, and the names of its trainable parameters."""


@dataclass
class _Live:
    """One training_step under way: what it has done so far.

    Attributes:
        step: with the sample.
        parameters: for each optimizer those it holds, by name.
        values: of parameters before each of its steps.
        began_at: ``global_step`` at its beginning.
        default_dtype: torch's, outside the precision plugin's context.
        recording: of what it logs.
        number: how many optimizer steps it has taken.
        losses: given to ``manual_backward`` since the last of them.
        known: losses of the placeholder, and what stands for each.
        released: places of the private optimizers that have stepped.
        total: of the last private step. **Private**.
        logged: how many calls of ``self.log`` came before it.
        kept: the sample's micro-batches, if there may be several private steps.
    """

    step: OpenStep
    parameters: list[dict[str, nn.Parameter]]
    values: ValuesOverSteps
    began_at: int
    default_dtype: torch.dtype
    recording: Recording
    number: int = 0
    losses: list[Tensor] = field(default_factory=list)
    known: list[KnownLoss] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    total: Accumulated | None = None
    logged: int = 0
    kept: list[tuple[Any, int]] | None = None


class ManualObjective:
    """Runs a training_step with ``automatic_optimization=False`` privately.

    One Lightning batch is one sample and one charge, whatever the number of private optimizers m: each of their releases
    gets noise multiplier σ·√m, and m Gaussian releases of one sample with σ·√m each are together no more than one with σ
    (Dong, Roth, Su 2019, arXiv 1905.02383, corollary 2). Steps of public optimizers are neither clipped nor charged; their
    losses are computed from the placeholder, so they cannot see the data.

    Args:
        script: who steps when.
        seen: the private steps of the script, one for each optimizer and set of its parameters.
        selections: the engine of each.
        unseen: the engine for a step that is in no script; always right, if slow.
    """

    def __init__(
        self, script: Script, seen: Sequence[Wanted], selections: Mapping[Key, Selection], unseen: Selection
    ) -> None:
        self._script, self._seen, self._selections, self._unseen = script, seen, selections, unseen
        self._live: list[_Live] = []

    def losses(self, planned: Planned, form: ExampleForm) -> Losses:
        """The loss of each private optimizer seen in the dry run, and its parameters."""
        return [(loss_up_to(form, planned.logs, wanted), wanted.parameters) for wanted in self._seen]

    def training_step(self, step: OpenStep) -> Any:
        """Run the user's training_step once, on the placeholder; private steps get their gradient from the sample.

        Returns:
            What training_step returned, with the sample's mean loss in the place of the placeholder's.

        Raises:
            PreflightError: training_step did what it did not do in the dry run and what cannot be private.
        """
        planned, log = step.run.planned, step.run.log_train_metrics
        module, logs = planned.module, planned.logs
        default_dtype = torch.get_default_dtype()
        values = ValuesOverSteps(module)
        held, began_at = held_by_optimizers(module), global_step(module)
        with (
            step.seeded(1),
            logs.listening() as recording,
            module.trainer.precision_plugin.train_step_context(),
        ):
            live = _Live(step, held, values, began_at, default_dtype, recording)
            self._live[:] = [live]
            try:
                output = module.training_step(self._script.placeholder, *step.rest)
            finally:
                self._live.clear()
        if not live.released and not planned.ledger.plan.mechanism.memoryless:
            raise PreflightError(
                f"sampling={planned.ledger.plan.sampling!r}: expected a private step in every training_step, since each "
                "example is in one step of a block, and a sample that is not stepped on would not be counted. Step in "
                "every batch, or give sampling='poisson'."
            )
        step.tally.unused_samples += not live.released
        if live.losses:
            raise PreflightError(
                "training_step called manual_backward without a step of an optimizer after it: expected opt.step() in "
                "every training_step that has a loss. Gradients are not accumulated over batches."
            )
        examples = 0 if live.total is None else live.total.examples
        if log:
            if live.total is not None:
                logs.replay(live.total.outputs, examples, step.share)
            log_late(logs, recording.log_calls[live.logged :], live.known, examples)
        return in_place_of(output, live.known)

    def backward(self, planned: Planned, loss: Tensor, *args: Any, **options: Any) -> Tensor:
        """A ``manual_backward`` on the placeholder: its gradient is nobody's, and a private step replaces it."""
        if not self._live:
            raise RuntimeError(
                "manual_backward outside training_step: expected it inside. Only there is it known whose data it sees."
            )
        loss = at_hand(loss)
        self._live[0].losses.append(loss)
        return Strategy.backward(planned.module.trainer.strategy, loss, None, *args, **options)

    def step_closure(self, optimizer: Any, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of an ``optimizer.step()``, followed by what puts the gradient of that step into ``p.grad``."""
        if not self._live:
            raise RuntimeError(
                "optimizer.step() outside training_step: expected it inside. A step anywhere else would use a gradient "
                "that was released for another step."
            )
        live = self._live[0]
        optimizers = live.step.run.planned.module.trainer.optimizers
        place = next(place for place, one in enumerate(optimizers) if one is optimizer)

        def then() -> Any:
            outcome = closure()
            if place in self._script.public:
                _average_over_ranks(live, place)
            else:
                self._put_private_gradient(live, place)
            if len(optimizers) > 1:  # else nothing comes after the one step
                live.values.about_to_step(optimizer)
            live.number += 1
            live.losses.clear()
            return outcome

        return then

    def _put_private_gradient(self, live: _Live, place: int) -> None:
        check_private_step(place, live.losses, live.released)
        step, parameters, several = live.step, live.parameters[place], len(self._script.private) > 1
        planned = step.run.planned
        wanted = Wanted(step.rest, live.number, place, parameters, live.began_at)
        loss_function = loss_up_to(planned.form, planned.logs, wanted, live.values)
        selection = self._selections.get((place, frozenset(parameters)), self._unseen)
        with torch.enable_grad(), _outside_the_precision_context(live):
            if several and live.kept is None:
                live.kept = list(step.micro_batches())
            micro_batches = step.micro_batches() if live.kept is None else live.kept
            total = step.clipped_sum(selection, loss_function, parameters, micro_batches)
            gradient = step.release(total.gradient, part=len(live.released), parts=len(self._script.private))
            live.released.append(place)  # at once: whatever happens from here on, the next release has noise of its own
        for group in planned.module.trainer.optimizers[place].param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for name, parameter in parameters.items():
            put_gradient(parameter, as_complex_like(gradient[name], parameter))
        tell_noise_std(planned.module.trainer.optimizers[place], step.tally.noise_std)
        live.total, live.logged = total, len(live.recording.log_calls)
        for column, loss in enumerate(live.losses, start=-len(live.losses)):
            means = [output[column] for output in total.outputs]
            live.known.append(
                KnownLoss(loss.detach(), torch.cat(means).mean() if means else torch.zeros_like(loss).detach())
            )


def _average_over_ranks(live: _Live, place: int) -> None:
    """Public losses draw other random numbers on every rank: the mean of their gradients keeps the ranks equal."""
    live.known += [KnownLoss(loss.detach(), loss.detach()) for loss in live.losses]
    world = live.step.run.planned.world
    if world.size == 1:
        return
    for parameter in live.parameters[place].values():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = world.mean(gradient)


@contextmanager
def _outside_the_precision_context(live: _Live) -> Iterator[None]:
    """Norms, clipping and noise are computed as under automatic optimization: not in the step's low precision."""
    inside = torch.get_default_dtype()
    torch.set_default_dtype(live.default_dtype)
    try:
        with torch.autocast(live.step.run.planned.world.device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(inside)
