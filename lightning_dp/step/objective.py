"""What a step trains: the one loss of automatic optimization, or the steps that a training_step takes itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_dp.engines.accumulate import Accumulated
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.loading.form import ExampleForm
from lightning_dp.mechanism.complex import as_complex_like, as_real_pairs
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.optim.noise_std import tell_noise_std
from lightning_dp.plan.filtering import GradientFilter
from lightning_dp.ranks.sharding import reshard
from lightning_dp.step.open_step import OpenStep
from lightning_dp.step.parameter_hooks import put_gradient
from lightning_dp.step.planned import Planned
from lightning_dp.step.spectral import SpectralNorms
from lightning_dp.step.two_points import loss_at_two_points
from lightning_dp.step.user_loss import example_loss, takes_batch_idx
from lightning_dp.step.without_data import WithoutData

Losses = Sequence[tuple[LossFunction, dict[str, nn.Parameter]]]
"""Each loss whose gradients are clipped, and the parameters of which they are taken, by name."""


class Objective(Protocol):
    """Both kinds of optimization, as a step sees them."""

    def losses(self, planned: Planned, form: ExampleForm) -> Losses:
        """What the checks before the first step look at; ``form`` says how an example comes back to training_step."""

    def training_step(self, step: OpenStep) -> STEP_OUTPUT:
        """What the user's training_step would return for the whole batch."""

    def backward(self, planned: Planned, loss: Tensor, **options: Any) -> Tensor:
        """Lightning's call between ``training_step`` and ``optimizer.step``, or the user's ``manual_backward``."""

    def step_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of an optimizer's step."""


class AutomaticObjective:
    """One loss, one backward pass and one release for each step.

    Args:
        without_data: runs training_step on an example without content, for what it logs where no example is drawn.
        rule: of a filter between release and optimizer.
    """

    def __init__(self, without_data: WithoutData, rule: GradientFilter | None = None) -> None:
        self._without_data, self._rule = without_data, rule
        self._unreleased: list[tuple[OpenStep, Accumulated]] = []

    def losses(self, planned: Planned, form: ExampleForm) -> Losses:
        """The user's training_step, of all trainable parameters."""
        rest = (0,) if takes_batch_idx(planned.module) else ()
        return [(example_loss(form, planned.logs, rest), trainable(planned.module))]

    def training_step(self, step: OpenStep) -> STEP_OUTPUT:
        """Sum this rank's clipped per-example gradients over the sample; keep them for :meth:`backward`.

        Returns:
            The mean loss, detached, or a dict with it. With no example on this rank the loss is 0.
        """
        run, planned = step.run, step.run.planned
        SpectralNorms(planned.module).advance()
        given: Mapping[str, Tensor] = trainable(planned.module)
        fixed = None
        if run.layers is not None:
            given, fixed = run.layers.begin(step.sample.step)
        loss_function = example_loss(planned.form, planned.logs, step.rest, fixed=fixed)
        moved = {} if self._rule is None else step.tally.filtered.moved(trainable(planned.module))
        if self._rule is not None and moved:
            loss_function = loss_at_two_points(planned.form, planned.logs, step.rest, self._rule, moved)
        total = step.clipped_sum(run.selection, loss_function, given, step.micro_batches())
        self._unreleased[:] = [(step, total)]
        alone = partial(self._without_data, loss_function, as_real_pairs(given))
        extras = planned.logs.replay(
            total.outputs, total.examples, step.share, log=run.log_train_metrics, without_data=alone
        )
        loss = torch.cat(total.losses).mean() if total.losses else torch.zeros((), device=planned.world.device)
        return {"loss": loss, **extras} if extras else loss

    def backward(self, planned: Planned, loss: Tensor, **_: Any) -> Tensor:
        """Charge the ledger, release the noisy gradient, and put it into ``p.grad`` of the trainable parameters.

        Raises:
            BudgetExceededError: the step would overspend the target ε. Nothing is released.
            RuntimeError: there was no training_step before.
        """
        if not self._unreleased:
            raise RuntimeError(
                "backward without a private training_step: expected one training_step for each backward. "
                "Use automatic optimization and an optimizer that calls its closure once per step."
            )
        step, total = self._unreleased.pop()
        module, strategy = planned.module, planned.module.trainer.strategy
        strategy.pre_backward(loss)
        strategy.precision_plugin.pre_backward(loss, module)
        reshard(module)  # a hook that called the module has left a part of it whole
        gradient, noise_std = step.release(total.gradient), step.tally.noise_std
        if self._rule is not None:
            gradient, noise_std = step.tally.filtered.passed(gradient, noise_std, trainable(module), self._rule)
        for name, parameter in trainable(module).items():
            put_gradient(parameter, as_complex_like(gradient[name], parameter))
        for optimizer in module.trainer.optimizers:
            tell_noise_std(optimizer, noise_std)
        loss = strategy.precision_plugin.post_backward(loss, module)
        strategy.post_backward(loss)
        return loss

    def step_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The gradient is there; of the loss, which is private, the optimizer gets a zero in its place."""

        def public() -> Any:
            loss = closure()
            return torch.zeros_like(loss) if isinstance(loss, Tensor) else loss

        return public
