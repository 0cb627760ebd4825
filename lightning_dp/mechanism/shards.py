"""A flat vector of whole parameters, cut into what each rank keeps of them, and back to a shard by its name."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def by_rank(flat: Tensor, like: Mapping[str, Tensor], world_size: int) -> Tensor:
    """The coordinates of ``flat`` in the order of the ranks that keep them, ready for a reduce-scatter.

    Every parameter is cut along its first axis as ``torch.chunk`` cuts it, which is how FSDP2 shards: the first ranks
    have ceil(n / world_size) rows each, later ones the rest or none. Missing rows are filled with zeros, so that all
    ranks get equally many numbers.

    Args:
        flat: ``(P,)``, made by :func:`~lightning_dp.mechanism.reduce.flatten`.
        like: parameter name → a tensor of the whole parameter's shape, with at least one axis.
        world_size: how many ranks keep a shard each.

    Returns:
        ``(world_size · S,)``, where S is the number of coordinates of a rank with its padding.

    Example:
        >>> by_rank(torch.arange(5.0), {"a": torch.zeros(3), "b": torch.zeros(2, 1)}, 2)
        tensor([0., 1., 3., 2., 0., 4.])
    """
    sizes = [_padded(tensor, world_size) for tensor in like.values()]
    ranks = flat.new_zeros(world_size, sum(sizes))
    parts = torch.split(flat, [tensor.numel() for tensor in like.values()])
    for part, column, size in zip(parts, torch.split(ranks, sizes, dim=1), sizes, strict=True):
        full = part.numel() // max(size, 1)
        column[:full] = part[: full * size].view(full, size)
        column[full : full + 1, : part.numel() - full * size] = part[full * size :]
    return ranks.flatten()


def of_rank(mine: Tensor, like: Mapping[str, Tensor], rank: int, world_size: int) -> dict[str, Tensor]:
    """The shards that ``rank`` keeps, by name, without the padding.

    Args:
        mine: ``(S,)``, this rank's part of what :func:`by_rank` gave, summed over the ranks.
        like: as for :func:`by_rank`.
        rank: which shards these are.
        world_size: how many ranks keep a shard each.

    Returns:
        Parameter name → its rows on this rank, of the type of ``like``; no row where there is none left.

    Example:
        >>> of_rank(torch.tensor([2.0, 0.0, 4.0]), {"a": torch.zeros(3), "b": torch.zeros(2, 1)}, 1, 2)
        {'a': tensor([2.]), 'b': tensor([[4.]])}
    """
    parts = torch.split(mine, [_padded(tensor, world_size) for tensor in like.values()])
    shards = {}
    for part, (name, tensor) in zip(parts, like.items(), strict=True):
        chunk = -(-tensor.shape[0] // world_size)
        rows = max(0, min(tensor.shape[0] - rank * chunk, chunk))
        shards[name] = part.view(chunk, *tensor.shape[1:])[:rows].to(tensor.dtype)
    return shards


def _padded(tensor: Tensor, world_size: int) -> int:
    """How many coordinates of ``tensor`` each rank gets, padding included."""
    return -(-tensor.shape[0] // world_size) * tensor.shape[1:].numel()
