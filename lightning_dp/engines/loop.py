"""Per-example gradients one backward pass at a time: slow, and works for everything."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import batch_of_one, check_batch_axis
from lightning_dp.engines.backward import plain_gradient
from lightning_dp.engines.drawing import Alone, Drawing
from lightning_dp.engines.groups import check_one_structure
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.mechanism.adaptive import nothing_beside
from lightning_dp.mechanism.clip import accumulation_dtype, clip_and_sum
from lightning_dp.plan.clipping import Clipping, as_clipping


class LoopEngine(Engine):
    """A batch-of-one backward pass per example: the oracle of the tests and the fallback for what vmap refuses.

    It is the backward pass of training without privacy, on the module's own parameters, see :func:`plain_gradient`.

    Memory: one gradient of every parameter, whatever the micro-batch. Time: one forward and backward per example.

    Args:
        in_place_of_others: whether it runs what another engine of the run cannot, or is compared with one. Then an example
            draws what it draws there, at a cost for each operation. Otherwise it draws from generators seeded for it.
    """

    name = "loop"
    is_reference = True
    grows_with_rows = False

    def __init__(self, *, in_place_of_others: bool = False) -> None:
        self._drawing = Drawing() if in_place_of_others else Alone()

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
        check_batch_axis(batch, examples)
        total = {name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype)) for name, p in parameters.items()}
        total |= nothing_beside(parameters, as_clipping(clipping))
        leaves = {name: as_leaf(parameter) for name, parameter in parameters.items()}
        norms, losses, outputs = [], [], []
        for index in range(examples if counted is None else counted):
            loss, output, gradients = self._drawing.one_pass(
                batch_of_one(batch, index), partial(plain_gradient, loss_function, leaves)
            )
            rows = {name: gradient.unsqueeze(0) for name, gradient in gradients.items()}
            clipped, norm = clip_and_sum(rows, clipping)
            self.note(clipped, norm)
            for name, gradient in clipped.items():
                total[name] += gradient
            norms.append(norm)
            losses.append(loss)
            outputs.append(pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, output))
        return ClippedSum(total, torch.cat(norms), torch.stack(losses), _stack(outputs))

    def note(self, clipped: Mapping[str, Tensor], norm: Tensor) -> None:
        """Called with each example's clipped gradient and its norm before, in their order. Does nothing; a replay listens."""


def as_leaf(parameter: Tensor) -> Tensor:
    """The parameter itself if a backward pass can bring it a gradient, else a leaf with its values.

    With the parameter itself nothing differs from training without privacy, wherever the module may hold it.
    """
    return parameter if parameter.is_leaf and parameter.requires_grad else parameter.detach().requires_grad_()


def _stack(outputs: list[Any]) -> Any:
    """Per-example outputs with a leading axis of examples, as vmap would give them."""
    flattened = [pytree.tree_flatten(output) for output in outputs]
    check_one_structure([structure for _, structure in flattened])
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    stacked = [torch.stack(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(stacked, flattened[0][1])
