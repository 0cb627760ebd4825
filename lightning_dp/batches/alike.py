"""Batches of single examples, put together where they are alike: what no user code does, so that it mixes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.axis import BatchAxis, is_shared
from lightning_dp.batches.microbatch import Apart, Element, Shared, is_list_of_values
from lightning_dp.batches.simple import flattened

_VALUES = (str, bytes, int, float, complex)


@dataclass(frozen=True)
class Alike:
    """Several examples whose batches of one differ in rows alone.

    Attributes:
        batch: all of them.
        places: which they are, among those that were put together.
    """

    batch: Any
    places: list[int]


def put_together(ones: Sequence[Any], rows: int = 1, axis: BatchAxis = 0) -> list[Alike]:
    """Batches of one, in the fewest batches of several of which each can be taken out again as it was.

    Tensors with rows are concatenated if they have one type and one shape, and so are lists with a value for each row.
    Whatever else a batch holds (a number, a text, what is shared by ``axis``) is the example's own: only examples with the
    same come together. A batch with a part of which this cannot be said stays by itself.

    Args:
        ones: with containers in parts and rows on the first axis; of one example each, or of one unit.
        rows: how many rows each has.
        axis: says what is shared.

    Guarantee:
        ``batch_of_one`` of a result is the batch that was given, whatever the others are.

    Example:
        >>> ones = [{"x": torch.ones(1, 2), "n": 2}, {"x": torch.ones(1, 3), "n": 3}, {"x": torch.zeros(1, 2), "n": 2}]
        >>> [(alike.places, tuple(alike.batch["x"].shape)) for alike in put_together(ones)]
        [([0, 2], (2, 2)), ([1], (1, 3))]
    """
    found: dict[Any, list[tuple[Any, list[Any], list[int], list[list[Any]]]]] = {}
    order: list[tuple[Any, list[int], list[list[Any]]]] = []
    for place, one in enumerate(ones):
        leaves, structure = flattened(one, is_leaf=is_list_of_values)
        shared = _shared_places(one, axis)
        kinds = tuple(
            "shared" if at in shared or isinstance(leaf, Shared) else _kind(leaf, rows)
            for at, leaf in enumerate(leaves)
        )
        if None in kinds:
            order.append((structure, [place], [leaves]))
            continue
        ours = [leaf for leaf, kind in zip(leaves, kinds, strict=True) if kind == "shared"]
        for other, theirs, places, columns in found.setdefault(kinds, []):
            if other == structure and all(map(_same, ours, theirs)):
                places.append(place)
                columns.append(leaves)
                break
        else:
            group = (structure, ours, [place], [leaves])
            found[kinds].append(group)
            order.append((structure, group[2], group[3]))
    return [
        Alike(pytree.tree_unflatten([_joined(column) for column in zip(*columns, strict=True)], structure), places)
        for structure, places, columns in order
    ]


def kept_apart(ones: Sequence[Any]) -> list[Alike]:
    """Batches of one of which nothing is known but whose each is, see :class:`~lightning_dp.batches.microbatch.Apart`."""
    return [Alike(Apart([Element(one) for one in ones]), list(range(len(ones))))]


def _kind(leaf: Any, rows: int) -> Any:
    """What must be the same for two leaves to be joined; ``None`` for a leaf that cannot be."""
    if isinstance(leaf, Tensor):
        clear = leaf.ndim > 0 and leaf.shape[0] == rows
        return (leaf.dtype, leaf.shape[1:], leaf.device, leaf.layout) if clear else None
    if is_list_of_values(leaf):
        return type(leaf) if len(leaf) == rows else None
    return (type(leaf), repr(leaf)) if leaf is None or isinstance(leaf, _VALUES) else None


def _shared_places(one: Any, axis: BatchAxis) -> frozenset[int]:
    if isinstance(axis, (int, str)) or None not in axis.values():
        return frozenset()
    paths = pytree.tree_leaves_with_path(one, is_leaf=is_list_of_values)
    return frozenset(place for place, (path, leaf) in enumerate(paths) if is_shared(axis, path, leaf))


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Shared) and isinstance(other, Shared):
        return _same(one.content, other.content)
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape and one.device == other.device
        return alike and (one.data_ptr() == other.data_ptr() or torch.equal(one, other))
    try:
        return one is other or (type(one) is type(other) and bool(one == other))
    except Exception:  # an object that cannot be compared
        return False


def _joined(column: tuple[Any, ...]) -> Any:
    first = column[0]
    if len(column) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(column)
    if is_list_of_values(first):
        return type(first)(value for values in column for value in values)
    return first
