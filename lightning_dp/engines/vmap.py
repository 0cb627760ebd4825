"""Per-example gradients by ``torch.func``: any loss it can trace, all examples of a micro-batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import grad_and_value, vmap

from lightning_dp.clipping import Clipping
from lightning_dp.functional.clip import clip_and_sum
from lightning_dp.functional.gradient import ClippedSum, LossFunction, first_rows, scalar_loss
from lightning_dp.functional.microbatch import mappable


class VmapEngine:
    """``vmap(grad(loss))`` over the examples of a micro-batch; the reference engine.

    Memory: one gradient of every parameter per example of the micro-batch. The loss function sees batches of one
    (each tensor keeps its first axis, with length 1); anything in it that depends on an example's *values* in
    Python (``.item()``, ``if tensor:``) cannot be traced, and in-place changes of buffers are refused by torch.func.
    Random layers draw independently for each example. Leaves that are not tensors are shared by all examples.
    """

    name = "vmap"

    def clipped_sum(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        batch: Any,
        examples: int,
        clipping: Clipping | float,
        *,
        counted: int | None = None,
    ) -> ClippedSum:
        """See :class:`lightning_dp.functional.gradient.Engine`."""
        tensors, example = mappable(batch, examples)

        def loss_of_one(params: dict[str, Tensor], rows: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Any]]:
            loss, outputs = loss_function(params, example(rows))
            return scalar_loss(loss), outputs

        per_example = vmap(grad_and_value(loss_of_one, has_aux=True), in_dims=(None, 0), randomness="different")
        detached = {name: parameter.detach() for name, parameter in parameters.items()}
        gradients, (losses, outputs) = per_example(detached, tensors)
        gradient, norms = clip_and_sum(gradients, clipping, counted)
        return ClippedSum(gradient, norms[:counted], losses.detach()[:counted], first_rows(outputs, counted))
