"""The Gaussian noise of one step, in blocks of coordinates that the ranks divide among themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dp.mechanism.randomness import RandomKey, Stream

BLOCK, CUDA_BLOCK = 2**16, 2**22
"""Coordinates with one stream of their own. On CUDA fewer and larger, for its streams have 63-bit keys."""


def add_gaussian_noise(
    total: Tensor, *, noise_std: float, key: RandomKey, step: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Add independent N(0, noise_std²) to every coordinate of this rank's share of ``total``, in place.

    The coordinates are cut into blocks of :data:`BLOCK`, each with a stream of its own, and each block falls to one
    rank. So once the ranks' vectors are added up, every coordinate holds the noise exactly once, whatever
    ``world_size``; and its noise depends on (key, step, coordinate) alone, so that one rank and several, or a run that
    is resumed on fewer, add the same numbers.

    Args:
        total: the flat sum of clipped gradients, shape ``(P,)``, float32 or float64; the same P on every rank.
        noise_std: σ·C. 0 leaves ``total`` as it is.
        key: where the noise comes from; its NOISE stream at ``step`` is used for nothing else.
        step: the number of the step in the run's life, from 0. A step's noise must be added exactly once: two
            releases with one (key, step) could be subtracted from each other.
        rank: which share is this rank's.
        world_size: how many ranks add their shares, before their vectors are added up.

    Returns:
        ``total``.

    Raises:
        TypeError: ``total`` is of another type: a complex one would get no noise in its imaginary part.
        ValueError: ``rank`` is not one of ``world_size``: its share would be nobody's, or another's too.

    Guarantee:
        With L2 sensitivity C the ranks' total is the Gaussian mechanism with noise multiplier σ (Dwork and Roth 2014,
        Appendix A), up to floating point: the noise is a pseudorandom float, not a discrete Gaussian.

    On the CPU the numbers are NumPy's Philox under a 128-bit key (PyTorch's CPU generator would keep 32 bits of it), each
    block in a stretch of its own; on CUDA they are PyTorch's Philox under a 63-bit key a block, drawn on the device.

    Example:
        >>> key, shares = RandomKey.from_seed(0), [torch.zeros(100_000) for _ in range(2)]
        >>> for rank, share in enumerate(shares):
        ...     _ = add_gaussian_noise(share, noise_std=1.0, key=key, step=0, rank=rank, world_size=2)
        >>> torch.equal(sum(shares), add_gaussian_noise(torch.zeros(100_000), noise_std=1.0, key=key, step=0))
        True
    """
    if total.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"total of dtype={total.dtype}: expected torch.float32 or torch.float64. Sum in the accumulation type of "
            "lightning_dp.mechanism.clip, and store complex parameters as real ones (torch.view_as_real)."
        )
    if noise_std == 0:
        return total
    size = CUDA_BLOCK if total.device.type == "cuda" else BLOCK
    for block in share_of(rank, world_size, -(-total.numel() // size)):
        part = total[block * size : (block + 1) * size]
        part.add_(_standard_normal(part, key, step, block), alpha=noise_std)
    return total


def add_gaussian_noise_to_shards(
    shards: Iterable[tuple[int, Tensor]], coordinates: int, *, noise_std: float, key: RandomKey, step: int
) -> None:
    """What :func:`add_gaussian_noise` adds to a whole sum, added in place to those parts of it that a rank keeps.

    For sums that no rank has whole. The noise of a coordinate is the same as there, so if every coordinate is kept by
    exactly one rank it has its noise exactly once, and the same noise at any number of ranks. Blocks at the edge of a
    part are drawn by several ranks, each of which uses its own coordinates of them.

    Args:
        shards: (place of a part's first coordinate in the flat sum, the part), contiguous, float32 or float64, already
            added up over the ranks; in the order of their places.
        coordinates: P, of the flat sum.
        noise_std: σ·C. 0 leaves the parts as they are.
        key: as for :func:`add_gaussian_noise`.
        step: likewise.

    Raises:
        TypeError: a part is of another type.
        ValueError: parts overlap, or one reaches beyond P: it would have no noise, or another's too.

    Guarantee:
        As for :func:`add_gaussian_noise`, if the ranks' parts together are the sum.

    Example:
        >>> key, total = RandomKey.from_seed(0), torch.zeros(100_000)
        >>> add_gaussian_noise_to_shards([(7, total[7:])], 100_000, noise_std=1.0, key=key, step=0)
        >>> torch.equal(total[7:], add_gaussian_noise(torch.zeros(100_000), noise_std=1.0, key=key, step=0)[7:])
        True
    """
    kept = [(start, start + shard.numel(), shard.view(-1)) for start, shard in shards if shard.numel()]
    reached = 0
    for start, end, shard in kept:
        if shard.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"a part of dtype={shard.dtype}: expected torch.float32 or torch.float64, as sums have.")
        if start < reached or end > coordinates:
            raise ValueError(
                f"a part from {start} to {end} after one to {reached}, of {coordinates} coordinates: expected parts in order "
                "that do not overlap. Give the place of each part's first coordinate in the flat sum."
            )
        reached = end
    if noise_std == 0 or not kept:
        return
    like = kept[0][2]
    size = CUDA_BLOCK if like.device.type == "cuda" else BLOCK
    for block in range(-(-coordinates // size)):
        first, last = block * size, min((block + 1) * size, coordinates)
        here = [(max(start, first), min(end, last), start, shard) for start, end, shard in kept]
        here = [(begin, end, start, shard) for begin, end, start, shard in here if begin < end]
        if here:
            normal = _standard_normal(like.new_empty(last - first), key, step, block)
        for begin, end, start, shard in here:
            shard[begin - start : end - start].add_(normal[begin - first : end - first], alpha=noise_std)


def share_of(rank: int, world_size: int, blocks: int) -> range:
    """The blocks that fall to ``rank``: disjoint between ranks, together all, and as equal as possible.

    Raises:
        ValueError: ``rank`` is not one of ``world_size``.

    Example:
        >>> [list(share_of(rank, 3, 4)) for rank in range(3)]
        [[0], [1], [2, 3]]
    """
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank} with world_size={world_size}: expected a rank from 0 to {world_size - 1}. Give the rank and "
            "the number of the processes whose sums are added up."
        )
    return range(blocks * rank // world_size, blocks * (rank + 1) // world_size)


def _standard_normal(like: Tensor, key: RandomKey, step: int, block: int) -> Tensor:
    """As many numbers as ``like`` has, of its type, on its device."""
    if like.device.type == "cuda":
        on_device = torch.Generator(device=like.device).manual_seed(key.torch_seed(Stream.NOISE, step, block))
        return torch.randn(like.shape, generator=on_device, dtype=like.dtype, device=like.device)
    generator = key.generator(Stream.NOISE, step, block=block)
    normal: npt.NDArray[Any]
    if like.dtype == torch.float64:
        normal = generator.standard_normal(like.numel(), dtype=np.float64)
    else:
        normal = generator.standard_normal(like.numel(), dtype=np.float32)
    return torch.from_numpy(normal).to(device=like.device, dtype=like.dtype)
