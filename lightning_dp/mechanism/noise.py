"""What noise is to a release: something that is added to parts of a flat sum, block of coordinates by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.state import MechanismState

BLOCK = 2**16
"""Coordinates with one stream of their own."""

Parts = Sequence[tuple[int, Tensor]]
"""Parts of a flat sum: the place of a part's first coordinate, and its values, contiguous; in the order of the places."""


class Noise(Protocol):
    """The noise of one step.

    The noise of a coordinate depends on the key, the step and the coordinate's place alone, so that it is the same however
    the coordinates are divided among ranks.
    """

    def block(self, device: torch.device) -> int:
        """How many coordinates share a stream: shares of ranks begin and end with a block, and no number is drawn twice."""
        ...

    def add(
        self, parts: Parts, coordinates: int, *, key: RandomKey, step: int, state: MechanismState
    ) -> MechanismState:
        """Add to every coordinate of ``parts``, in place, its noise.

        Args:
            parts: those whose noise nobody else adds.
            coordinates: P, of the flat sum that they are parts of.
            key: secret; its NOISE stream at ``step`` is used for nothing else.
            step: the number of the step in the run's life. A step's noise must be added exactly once.
            state: what earlier steps have left.

        Returns:
            What this step leaves to the next.
        """
        ...

    def std(self, step: int, state: MechanismState) -> float:
        """The standard deviation of what :meth:`add` adds to a coordinate at ``step``, in the numbers of :meth:`to_float`."""
        ...

    def to_float(self, total: Tensor, divisor: float) -> Tensor:
        """A noisy total over ``divisor``, in floating point; ``total`` may be used up."""
        ...

    def released(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Tensors of the shapes and types of what is released of ``sums``; their values are not read."""
        ...


def own_share(held: Parts, coordinates: int, rank: int, world_size: int, block: int) -> list[tuple[int, Tensor]]:
    """What of ``held`` lies in the blocks that fall to ``rank``, as views.

    Args:
        held: parts of a flat sum, which ``world_size`` ranks hold alike.
        coordinates: P, of the flat sum.
        rank: which share.
        world_size: how many ranks divide the blocks among themselves.
        block: coordinates in a block.

    Example:
        >>> [own_share([(0, torch.arange(5))], 5, rank, 2, block=2) for rank in range(2)]
        [[(0, tensor([0, 1]))], [(2, tensor([2, 3, 4]))]]
    """
    blocks = share_of(rank, world_size, -(-coordinates // block))
    first, last = blocks.start * block, min(blocks.stop * block, coordinates)
    flat = ((at, values.view(-1)) for at, values in held)
    cut = ((max(at, first), values[max(first - at, 0) : max(last - at, 0)]) for at, values in flat)
    return [(at, values) for at, values in cut if values.numel()]


def in_blocks(parts: Parts, coordinates: int, size: int) -> Iterator[tuple[int, int, list[tuple[Tensor, slice]]]]:
    """Go through the blocks in which ``parts`` have coordinates.

    Yields:
        A block's number, how many coordinates it has, and what of the parts lies in it: a view, and where in the block.

    Raises:
        ValueError: parts overlap, or one reaches beyond P: it would have no noise, or another's too.
    """
    kept = [(start, start + part.numel(), part.view(-1)) for start, part in parts if part.numel()]
    reached = 0
    for start, end, _ in kept:
        if start < reached or end > coordinates:
            raise ValueError(
                f"a part from {start} to {end} after one to {reached}, of {coordinates} coordinates: expected parts in order "
                "that do not overlap. Give the place of each part's first coordinate in the flat sum."
            )
        reached = end
    for block in range(-(-coordinates // size)):
        first, last = block * size, min((block + 1) * size, coordinates)
        here = [
            (
                part[max(start, first) - start : min(end, last) - start],
                slice(max(start, first) - first, min(end, last) - first),
            )
            for start, end, part in kept
            if start < last and first < end
        ]
        if here:
            yield block, last - first, here


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
