"""A parameter of which each rank holds a part, whole on all of them for the length of a computation."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate


def all_of(tensor: Tensor) -> Tensor:
    """All of ``tensor``, the same on every rank; itself if it is no shard. A collective call where it is one."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def held_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Of a tensor that is whole on every rank, what this rank holds of ``parameter``; no rank tells another anything.

    Args:
        tensor: of the shape of the whole parameter.
        parameter: a shard, or a whole one, for which ``tensor`` is given back.
    """
    if not isinstance(parameter, DTensor):
        return tensor
    everywhere = [Replicate() for _ in parameter.placements]
    held: Tensor = DTensor.from_local(tensor, parameter.device_mesh, everywhere, run_check=False).redistribute(
        placements=parameter.placements
    )
    return held
