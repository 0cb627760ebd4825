"""The loss of which a filtered step takes gradients: at the weights, and a little further along the way they went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_dp.engines.protocol import LossFunction, scalar_loss
from lightning_dp.loading.form import ExampleForm
from lightning_dp.plan.filtering import GradientFilter
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.user_loss import example_loss

GHOST = "its layers see one set of weights in a step, and gradient_filter='disk' takes gradients at two"
"""Why the engine ghost is left out."""


def loss_at_two_points(
    form: ExampleForm,
    capture: StepCapture,
    rest: tuple[Any, ...],
    rule: GradientFilter,
    moved: Mapping[str, Tensor],
) -> LossFunction:
    """The user's training_step on one example, with c·∇f(x + γ·moved) + (1-c)·∇f(x) for a gradient.

    It is one function of the parameters, so engines clip the two gradients as one. What it is worth, and what is logged, is
    that of training_step at x, unless c is 1, when it is not run there.

    Args:
        form: how an example comes back to training_step.
        capture: takes what the step logs and returns.
        rest: what Lightning passes to training_step after the batch.
        rule: γ and c.
        moved: from the weights of the step before to those of this one, by name. Public.
    """

    def ahead(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: one + rule.lookahead * moved[n] if n in moved else one for n, one in weights.items()}

    here = example_loss(form, capture, rest)
    further = example_loss(form, capture, rest, begin_with=ahead)
    if rule.weight == 1:
        return further

    def loss_function(parameters: Mapping[str, Tensor], example: Any) -> tuple[Tensor, Any]:
        loss, outputs = here(parameters, example)
        loss = scalar_loss(loss)
        both = rule.weight * scalar_loss(further(parameters, example)[0]) + (1 - rule.weight) * loss
        return loss.detach() + (both - both.detach()), outputs

    return loss_function
