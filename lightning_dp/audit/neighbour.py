"""A small data set chosen from the user's, and its neighbours: without one example, or with another in its place."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

from lightning_dp.loading.reading import item

SCANNED = 512
"""So many records, from all over the data set, are looked at to choose from."""

FACTOR = -100.0
"""Numbers of an extreme example are so many times those of the most extreme one found."""


class AbsentRecordError(RuntimeError):
    """Somebody reads a record that is not in the neighbour's data."""


@dataclass(frozen=True)
class Neighbour:
    """How a data set differs from the chosen one.

    Attributes:
        name: in a sentence, as in ``"without example 12"``.
        absent: place of the example that is not there, ``None`` if all are.
        replaced: place of the example that is replaced.
        by: dataset index of the record that stands there.
        factor: by which its numbers are multiplied.
    """

    name: str
    absent: int | None = None
    replaced: int | None = None
    by: int = 0
    factor: float = 1.0

    @property
    def changed(self) -> int | None:
        """The place at which it differs."""
        return self.absent if self.replaced is None else self.replaced


class ChosenRecords(Dataset[Any]):
    """Some records of the user's data set, under numbers that stay the same if one of them is taken away.

    Everything else about it is the user's data set: its attributes, and ``__getitems__`` if it has one.

    Args:
        dataset: the user's.
        indices: which of its records, in order.
        neighbour: how this differs from them.
        absent: places of records that are not there.
    """

    def __init__(self, dataset: Any, indices: Sequence[int], neighbour: Neighbour, absent: frozenset[int]) -> None:
        self.dataset, self.indices, self.neighbour, self.absent = dataset, list(indices), neighbour, absent

    def __len__(self) -> int:
        return len(self.indices)

    def __getattr__(self, name: str) -> Any:
        if name in ("dataset", "__getstate__", "__setstate__", "__deepcopy__"):
            raise AttributeError(name)
        found = getattr(self.dataset, name)
        return self._several if name == "__getitems__" and callable(found) else found

    def __getitem__(self, place: int) -> Any:
        place = range(len(self))[int(place)]
        found = self.dataset[self._index(place)]
        return self._scaled(found) if place == self.neighbour.replaced else found

    @property
    def first_present(self) -> int:
        """The place of the first record that is there."""
        return min(place for place in range(len(self)) if place not in self.absent)

    def _several(self, places: Sequence[int]) -> Any:
        found = self.dataset.__getitems__([self._index(int(place)) for place in places])
        for position, place in enumerate(places):
            if int(place) == self.neighbour.replaced:
                found = self._in_place(found, position)
        return found

    def _index(self, place: int) -> int:
        if place in self.absent:
            raise AbsentRecordError(
                f"record {self.indices[place]} was read in a replay without it, where no step draws it: expected training to "
                "read drawn records only. What reads the data set beside the loader lets one example see another."
            )
        return self.neighbour.by if place == self.neighbour.replaced else self.indices[place]

    def _scaled(self, record: Any) -> Any:
        return pytree.tree_map(lambda part: scaled(part, self.neighbour.factor), record)

    def _in_place(self, found: Any, position: int) -> Any:
        if isinstance(found, list):
            return [self._scaled(one) if at == position else one for at, one in enumerate(found)]

        def column(part: Any) -> Any:
            if not isinstance(part, (Tensor, np.ndarray)) or part.ndim == 0:
                return part
            rows = part.clone() if isinstance(part, Tensor) else part.copy()
            rows[position] = scaled(rows[position], self.neighbour.factor)
            return rows

        return pytree.tree_map(column, found)


def scaled(part: Any, factor: float) -> Any:
    """A tensor, array or number of floating point times ``factor``; anything else as it is."""
    floating = (isinstance(part, Tensor) and part.is_floating_point()) or isinstance(part, (float, np.floating))
    if floating or (isinstance(part, np.ndarray) and part.dtype.kind == "f"):
        return part * factor
    return part


@dataclass(frozen=True)
class Scan:
    """What was found of some records.

    Attributes:
        index: in the data set, ``(n,)``.
        size: how many values each holds.
        magnitude: its largest number.
        label: its first whole number, if it has one.
    """

    index: list[int]
    size: list[int]
    magnitude: list[float]
    label: list[int | None]


def scan(dataset: Any) -> Scan:
    """Look at up to :data:`SCANNED` records."""
    size = len(dataset)
    places = sorted({int(place) for place in np.linspace(0, size - 1, min(SCANNED, size))})
    found = Scan(places, [], [], [])
    with isolate_rng():
        for index in places:
            parts = list(_values(item(dataset, index)))
            found.size.append(sum(len(part) for part in parts))
            numbers = [
                float(np.abs(part[np.isfinite(part)]).max(initial=0.0)) for part in parts if part.dtype.kind == "f"
            ]
            found.magnitude.append(max(numbers, default=0.0))
            found.label.append(
                next((int(part[0]) for part in parts if part.dtype.kind in "iub" and part.size == 1), None)
            )
    return found


def _values(record: Any) -> Iterator[np.ndarray]:
    for part in pytree.tree_leaves(record):
        if isinstance(part, Tensor):
            part = part.detach().cpu()
            yield (part.float() if part.dtype == torch.bfloat16 else part).reshape(-1).numpy()
        elif isinstance(part, (np.ndarray, np.generic, int, float)):
            values = np.asarray(part).reshape(-1)
            if values.dtype.kind in "iubf":
                yield values
        elif isinstance(part, str):
            yield np.zeros(len(part), dtype=np.int8)


@dataclass(frozen=True)
class Choice:
    """The records of a replay, and the neighbours it is compared with.

    Attributes:
        indices: dataset indices, in order.
        neighbours: with places in ``indices``.
    """

    indices: list[int]
    neighbours: list[Neighbour]


def choose(dataset: Any, count: int, remove: int | None) -> Choice:
    """Records in which trouble shows, and from all over the data set.

    They are the first and the last; the longest and the shortest; those with the largest and the smallest numbers; two of the
    rarest label that has two; and others evenly spaced. Taken away are, each in a replay of its own, the first (a batch's
    first row), the longest (or largest), and one of the rarest label; replaced by an extreme one is one in the middle.

    Args:
        dataset: the user's.
        count: how many, and as many more as those named above take.
        remove: dataset index of the one example to be taken away, ``None`` for those above.

    Raises:
        ValueError: there are fewer than two examples, or no example ``remove``.
    """
    size = len(dataset)
    if size < 2:
        raise ValueError(
            f"a data set of {size} examples: expected at least 2. One is taken away, and another is looked at."
        )
    if remove is not None and not 0 <= remove < size:
        raise ValueError(f"remove={remove}: expected the index of one of {size} examples, from 0 to {size - 1}.")
    found = scan(dataset)
    by = _ranked(found)
    longest, shortest = max(by, key=by.__getitem__), min(by, key=by.__getitem__)
    labels = Counter(label for label in found.label if label is not None)
    several = [label for label, times in labels.items() if times > 1]
    rare = min(several, key=lambda label: (labels[label], label), default=None)
    rarest = [
        index for index, label in zip(found.index, found.label, strict=True) if label == rare and rare is not None
    ][:2]
    wanted = [found.index[0], *([] if remove is None else [remove]), longest, shortest, found.index[-1], *rarest]
    spaced = [found.index[int(place)] for place in np.linspace(0, len(found.index) - 1, min(count, len(found.index)))]
    least = len(set(wanted))
    chosen = sorted(list(dict.fromkeys([*wanted, *spaced, *found.index]))[: max(count, least)])
    away = [remove] if remove is not None else list(dict.fromkeys([chosen[0], longest, *rarest[-1:]]))
    middle = chosen[len(chosen) // 2]
    neighbours = [Neighbour(f"without example {index}", absent=chosen.index(index)) for index in away]
    neighbours.append(
        Neighbour(
            f"with an extreme example in the place of example {middle}",
            replaced=chosen.index(middle),
            by=longest,
            factor=FACTOR,
        )
    )
    return Choice(chosen, neighbours)


def _ranked(found: Scan) -> dict[int, tuple[int, float]]:
    of_each = zip(found.size, found.magnitude, strict=True)
    return {
        index: (size, value if math.isfinite(value) else 0.0)
        for index, (size, value) in zip(found.index, of_each, strict=True)
    }
