"""Per-example gradients by ``torch.func``: any loss it can trace, all examples of a micro-batch at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.func import grad_and_value, vmap

from lightning_dp.engines.decisions import PartingError, answered_for_all
from lightning_dp.engines.drawing import Drawing, Draws
from lightning_dp.engines.examples import mappable
from lightning_dp.engines.groups import Groups
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction, first_rows, scalar_loss
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.mechanism.clip import clip_and_sum
from lightning_dp.plan.clipping import Clipping


class VmapEngine(Engine):
    """``vmap(grad(loss))`` over the examples of a micro-batch.

    Memory: one gradient of every parameter per example of the micro-batch. The loss function sees batches of one
    (each tensor keeps its first axis, with length 1). Where it decides in Python on an example's *values*
    (``if tensor:``, ``.item()``), examples that decide alike run together, see :mod:`lightning_dp.engines.decisions`.
    In-place changes of buffers are refused by torch.func. Random layers draw
    independently for each example, see :mod:`lightning_dp.engines.drawing`.
    """

    name = "vmap"

    def __init__(self) -> None:
        self.groups, self._drawing, self._loop = Groups(), Drawing(), LoopEngine(in_place_of_others=True)

    @property
    def partings(self) -> list[PartingError]:
        """See :class:`lightning_dp.engines.protocol.Engine`."""
        return self.groups.partings

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
        """See :class:`lightning_dp.engines.protocol.Engine`."""

        def one_by_one(rows: Any, count: int) -> ClippedSum:
            return self._loop.clipped_sum(loss_function, parameters, rows, count, clipping)

        def at_once(rows: Any, count: int, counted: int | None) -> ClippedSum:
            def run(content: Any, draws: Draws) -> ClippedSum:
                return _at_once(loss_function, parameters, content, count, clipping, counted, draws)

            return self._drawing.one_pass(rows, run)

        return self.groups.clipped_sum(at_once, one_by_one, batch, examples, counted)


def _at_once(
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    batch: Any,
    examples: int,
    clipping: Clipping | float,
    counted: int | None,
    draws: Draws,
) -> ClippedSum:
    """The clipped sum of examples that decide alike."""
    tensors, example = mappable(batch, examples)

    def loss_of_one(params: dict[str, Tensor], rows: list[Tensor]) -> tuple[Tensor, tuple[Tensor, Any]]:
        with answered_for_all(rows[0]), draws():
            loss, outputs = loss_function(params, example(rows))
        return scalar_loss(loss), outputs

    per_example = vmap(grad_and_value(loss_of_one, has_aux=True), in_dims=(None, 0), randomness="different")
    detached = {name: parameter.detach() for name, parameter in parameters.items()}
    with uncompiled():
        gradients, (losses, outputs) = per_example(detached, tensors)
    gradient, norms = clip_and_sum(gradients, clipping, counted)
    return ClippedSum(gradient, norms[:counted], losses.detach()[:counted], first_rows(outputs, counted))
