"""Privacy units of several examples: a drawn user's examples make one gradient, which is clipped once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import check_batch_axis, is_list_of_values, split, take
from lightning_dp.mechanism.randomness import RandomKey, Stream

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Units:
    """Whose each example is. **Private**, but for the number of units, which plays the part of the dataset's size.

    Units without an example do not occur: they could never contribute.

    Attributes:
        order: dataset indices sorted by unit, ``(N,)``.
        starts: where in ``order`` each unit's begin, and the end, ``(U + 1,)``.
        most: k, the most examples of a unit that take part in a step.
        name: what a unit is called, as in ``"user_id"``. Public, like ``most``.
    """

    order: Indices
    starts: Indices
    most: int
    name: str = "user"

    @classmethod
    def of(cls, numbers: npt.ArrayLike, most: int, name: str = "user") -> Units:
        """From the number of each example's unit, ``(N,)``; units are numbered 0, 1, … without a gap.

        Example:
            >>> Units.of([0, 1, 0], most=8).examples_of(0).tolist()
            [0, 2]
        """
        given = np.asarray(numbers, dtype=np.int64)
        counts = np.bincount(given)
        assert counts.all(), "a unit has no example"
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(np.argsort(given, kind="stable").astype(np.int64), starts.astype(np.int64), most, name)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def examples_of(self, unit: int) -> Indices:
        """Dataset indices of all examples of a unit, in order."""
        return self.order[self.starts[unit] : self.starts[unit + 1]]

    def drawn_of(self, unit: int, key: RandomKey, step: int) -> Indices:
        """Its examples in a step that has drawn the unit: all of them, or k chosen at random, anew in each step."""
        examples = self.examples_of(unit)
        if len(examples) <= self.most:
            return examples
        return np.sort(
            key.generator(Stream.UNITS, step, unit).choice(examples, self.most, replace=False, shuffle=False)
        )

    @property
    def digest(self) -> str:
        """Says whether two mappings are the same, and nothing else."""
        return hashlib.sha256(self.order.tobytes() + self.starts.tobytes()).hexdigest()[:16]


class Piece(NamedTuple):
    """What one micro-batch is made of.

    Attributes:
        units: the numbers of its n units, ``(n,)``; of examples, where each is a unit of its own.
        examples: dataset indices of their examples, unit by unit, as many of each, ``(n·m,)``.
    """

    units: Indices
    examples: Indices


def pieces(units: Units | None, drawn: Indices, physical_batch_size: int, key: RandomKey, step: int) -> list[Piece]:
    """A step's draw in micro-batches of at most ``physical_batch_size`` examples, and at least one unit.

    Units with the same number of examples come together, so that nothing is padded and nothing weighted.

    Args:
        units: whose each example is, or ``None`` where each is a unit of its own.
        drawn: this rank's part of the draw: numbers of units.
        physical_batch_size: the most examples in a micro-batch.
        key: chooses among the examples of units that have too many.
        step: number of the step.

    Guarantee:
        All examples of a unit that take part in a step are in one micro-batch, and are chosen without a look at any other
        unit's.
    """
    if units is None:
        return [Piece(part, part) for part in split(drawn, physical_batch_size)]
    of_unit = {int(unit): units.drawn_of(int(unit), key, step) for unit in drawn}
    sizes = np.array([len(examples) for examples in of_unit.values()], dtype=np.int64)
    return [
        Piece(part, np.concatenate([of_unit[int(unit)] for unit in part]))
        for size in np.unique(sizes)
        for part in split(drawn[sizes == size], max(1, physical_batch_size // int(size)))
    ]


@dataclass(frozen=True)
class Grouped:
    """A batch of n units with m examples each: every tensor is ``(n, m, ...)``. PyTorch's tree functions walk through it.

    Whatever takes a batch apart into examples takes this one apart into units.
    """

    parts: Any


class _Unnamed:
    """The place of the parts in a path, which names nothing."""

    def get(self, parent: Grouped) -> Any:
        """The part at this place."""
        return parent.parts

    def __str__(self) -> str:
        return ""


pytree.register_pytree_node(
    Grouped,
    lambda grouped: ([grouped.parts], None),
    lambda parts, _: Grouped(*parts),
    flatten_with_keys_fn=lambda grouped: ([(_Unnamed(), grouped.parts)], None),
)


@dataclass(frozen=True)
class _Several:
    """The values of a unit's examples, in a list of one value for each unit."""

    values: tuple[Any, ...]


def group(batch: Any, units: int, each: int) -> Any:
    """Put the examples of each unit together: rows ``(n·m, ...)`` become ``(n, m, ...)``.

    Args:
        batch: any nest, unit by unit, see :func:`~lightning_dp.batches.microbatch.check_batch_axis`.
        units: n.
        each: m, as many of each unit. With 1 the batch stays as it is: every row is a unit.

    Raises:
        BatchAxisError: it is not clear which part belongs to which example.

    Example:
        >>> import torch
        >>> group(torch.arange(6), 3, 2).parts.tolist()
        [[0, 1], [2, 3], [4, 5]]
    """
    if each == 1:
        return batch
    check_batch_axis(batch, units * each)

    def together(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.reshape(units, each, *leaf.shape[1:])
        if is_list_of_values(leaf):
            return type(leaf)(_Several(tuple(leaf[at : at + each])) for at in range(0, len(leaf), each))
        return leaf

    return Grouped(pytree.tree_map(together, batch, is_leaf=is_list_of_values))


def ungroup(batch: Any) -> Any:
    """The inverse of :func:`group`: an ordinary batch of all the examples, as any training_step takes it."""
    if not isinstance(batch, Grouped):
        return batch

    def apart(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.flatten(0, 1)
        if is_list_of_values(leaf) and isinstance(leaf[0], _Several):
            return type(leaf)(value for several in leaf for value in several.values)
        return leaf

    return pytree.tree_map(apart, batch.parts, is_leaf=is_list_of_values)


def of_two(batch: Any, examples: int, units: Units | None) -> Any:
    """A batch for checks: each example twice, as a unit of two, if units have several in this run."""
    if units is None or units.most == 1:
        return batch
    return group(take(batch, [index for index in range(examples) for _ in range(2)]), examples, 2)


def counted(units: Units | None, examples: int, dataset_size: int) -> int:
    """How many examples, from the first on, are among those that the plan counts, or are had by units that it counts.

    An audit's canaries come behind these.

    Example:
        >>> counted(None, 12, 10), counted(Units.of([0, 0, 1, 2], most=8), 4, 2)
        (10, 3)
    """
    return min(examples, dataset_size if units is None else int(units.starts[min(len(units), dataset_size)]))
