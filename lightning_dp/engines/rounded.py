"""Per-example gradients rounded to an integer grid, so that their sum is exact in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import batch_of_one, check_batch_axis
from lightning_dp.engines.groups import check_one_structure
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.mechanism.adaptive import nothing_beside
from lightning_dp.mechanism.grid import RESOLUTION, to_grid
from lightning_dp.plan.clipping import Clipping, as_clipping


class RoundedEngine(Engine):
    """An engine's clipped gradients as integers: one example at a time, each rounded before anything is added.

    An example is worked on alone, in a batch of one, so its integers do not depend on which other examples were drawn:
    matrix products of other sizes may round differently in the last place.

    Args:
        engine: gives the clipped gradient of a batch of one.
        resolution: Δ, the clip norm in units of the grid.
    """

    grows_with_rows = False
    sum_dtype = torch.int64

    def __init__(self, engine: Engine, resolution: int = RESOLUTION) -> None:
        self.engine, self.resolution = engine, resolution
        self.name, self.is_reference = engine.name, engine.is_reference

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
        """See :class:`lightning_dp.engines.protocol.Engine`; the gradient is int64, in units of C/Δ."""
        check_batch_axis(batch, examples)
        total = {name: torch.zeros_like(p, dtype=self.sum_dtype) for name, p in parameters.items()}
        total |= nothing_beside(parameters, as_clipping(clipping), self.sum_dtype)
        sensitivity, parts = as_clipping(clipping).sensitivity, []
        for index in range(examples if counted is None else counted):
            one = self.engine.clipped_sum(loss_function, parameters, batch_of_one(batch, index), 1, clipping)
            for name, units in to_grid(one.gradient, sensitivity, self.resolution).items():
                total[name] += units
            parts.append(one)
        norms, losses = torch.cat([one.norms for one in parts]), torch.cat([one.losses for one in parts])
        return ClippedSum(total, norms, losses, _joined([one.outputs for one in parts]))


def _joined(outputs: list[Any]) -> Any:
    """Outputs of batches of one as the outputs of one batch: tensors on their first axis, other values of the first."""
    flattened = [pytree.tree_flatten(output) for output in outputs]
    check_one_structure([structure for _, structure in flattened])
    columns = zip(*(leaves for leaves, _ in flattened), strict=True)
    joined = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return pytree.tree_unflatten(joined, flattened[0][1])
