"""A micro-batch, read and collated: one example at a time wherever the user's code could mix several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch.utils.data import Dataset, default_collate, get_worker_info

from lightning_dp.batches.alike import Alike, kept_apart, put_together
from lightning_dp.batches.axis import BatchAxis, from_front, to_front
from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.batches.microbatch import Apart, BatchAxisError
from lightning_dp.errors import PreflightError
from lightning_dp.loading.kept_by_data import KeptByData
from lightning_dp.loading.own_generators import NEAR, own_generators, put_back, reseed, seeded_as_torch_is
from lightning_dp.loading.reading import columns_of, read, together
from lightning_dp.loading.repeated_reads import OFTEN, check_repeats, out_of_reach
from lightning_dp.loading.row_wise import draws_nothing, is_row_wise
from lightning_dp.mechanism.seeded_globals import globals_put_back, seed_globals

_ALL_BITS = 2**64 - 1


class Drawn(NamedTuple):
    """What a worker is asked for. Neither the key nor the step is in it.

    Attributes:
        indices: dataset indices, unit by unit.
        seeds: 64 bits for each, a function of the run's key, the step and the index.
        each: how many examples each unit has.
        common: 64 bits for the whole step, by which draws what is vouched for.
    """

    indices: list[int]
    seeds: list[int]
    each: int = 1
    common: int = 0


@dataclass(frozen=True)
class OneByOne:
    """A micro-batch whose examples (or units) were collated one by one.

    Attributes:
        groups: those that are alike, put together as ``collate_fn`` might have put them.
    """

    groups: list[Alike]


class Examples(Dataset[Any]):
    """The user's data set and ``collate_fn``, asked for micro-batches.

    Before each example torch's, NumPy's and Python's global generators, and those that data set and ``collate_fn`` hold, are
    seeded with the example's own seed. A ``collate_fn`` and a ``__getitems__`` that are not known to treat each example by
    itself are called for one example (or unit) at a time.

    Guarantee:
        What is made of an example is a function of the example, its seed, and the state of the user's own objects.

    Args:
        dataset: the user's.
        collate_fn: the user's.
        row_wise: what the user vouches for, see :mod:`lightning_dp.loading.row_wise`.

    Attributes:
        axis: where batches have their examples.
        each: whether batches of one are never put together, because nobody knows how.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], row_wise: Sequence[str] = ()) -> None:
        self.dataset, self.collate_fn = dataset, collate_fn
        self.axis: BatchAxis = 0
        self.each = False
        self.known_collate = is_row_wise(collate_fn)
        self._quiet = draws_nothing(dataset)
        vouched = "__getitems__" in row_wise
        several = callable(getattr(dataset, "__getitems__", None)) and (self._quiet or vouched)
        self._read_at_once = several or (self._quiet and self.known_collate)
        self.collate_at_once = self.known_collate or "collate_fn" in row_wise
        owners = (dataset,) if self.collate_at_once else (dataset, collate_fn)
        self._kept = None if "__getitem__" in row_wise else KeptByData(*owners)
        self._found: list[Any] | None = None
        self._again = self._restless = self._all_found = False

    def __getstate__(self) -> dict[str, Any]:
        """Generators are found again in each worker."""
        return {**self.__dict__, "_found": None, "_all_found": False}

    @property
    def seeded(self) -> bool:
        """Whether anything may draw."""
        return not (self._quiet and self.known_collate)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, drawn: Drawn) -> Any:
        """The micro-batch: of ``collate_fn``, or :class:`OneByOne`."""
        if not self.seeded:
            columns = None if self.each else columns_of(self.dataset, drawn.indices)
            if columns is not None and self.collate_fn is default_collate:
                return columns
            return self.together(read(self.dataset, drawn.indices), drawn.each)
        here = get_worker_info() is None
        while True:
            if self._found is None:
                self._found = own_generators(self.dataset, self.collate_fn)
            generators = self._found
            with globals_put_back() if here else nullcontext(), put_back(generators) if here else nullcontext():
                found = self._seeded(drawn, generators)
            near = own_generators(self.dataset, self.collate_fn, most=NEAR)
            if self._restless or {*map(id, near)} <= {*map(id, generators)}:
                self._again, self._all_found = False, True
                return found
            # One was made on the way, as at the first __getitem__, and has drawn for one example after the other: once more.
            self._restless, self._again, self._found = self._again, True, None

    def _seeded(self, drawn: Drawn, generators: list[Any]) -> Any:
        if self._read_at_once:
            self._seed(drawn.common, generators)
            found = read(self.dataset, drawn.indices)
            if self.collate_at_once and not self.each:
                return self._at_once(found, drawn, generators)
            if type(found) is list and len(found) == len(drawn.indices):
                return self._one_by_one(found, drawn, generators)
        records = []
        ones: list[Any] = []
        kept = self._kept
        if kept is not None:
            kept.look()
        repeated: Callable[[], None] = _nothing
        for place, (index, seed) in enumerate(zip(drawn.indices, drawn.seeds, strict=True)):
            again = partial(self._read_again, seed, generators)
            found = again(index)
            if kept is not None:
                kept.check(index, again)
                if place == 0 and seed % OFTEN == 0 and self._all_found:
                    repeated = partial(check_repeats, index, out_of_reach(found), partial(again, index))
            if type(found) is not list or len(found) != 1:  # columns, of which only collate_fn makes a batch
                if drawn.each > 1:
                    found = read(self.dataset, drawn.indices[place : place + drawn.each])
                if place % drawn.each == 0:
                    ones.append(self._alone(found))
                continue
            records.append(found[0])
            if not self.collate_at_once and len(records) == drawn.each:
                ones.append(self._alone(records))
                if kept is not None:
                    kept.check(index, partial(self._collated_again, again))
                records = []
        repeated()
        if ones:
            return self.put(ones, drawn.each)
        if self.each:
            return self._one_by_one(records, drawn, generators)
        return self._at_once(records, drawn, generators)

    def _at_once(self, found: Any, drawn: Drawn, generators: list[Any]) -> Any:
        if not self.known_collate:  # vouched for: what it draws depends on nobody
            self._seed(drawn.common ^ _ALL_BITS, generators)
        return self.collate_fn(found)

    def _read_again(self, seed: int, generators: list[Any], index: int) -> Any:
        """An example, or columns with one row, read with a seed."""
        self._seed(seed, generators)
        return read(self.dataset, [index])

    def _collated_again(self, again: Callable[[int], Any], index: int) -> Any:
        return self._alone(again(index))

    def together(self, found: Any, each: int = 1) -> Any:
        """A batch of what was read, its examples collated as in training but with no seeds."""
        if type(found) is not list or (self.collate_at_once and not self.each):
            return self.collate_fn(found)
        return self.put([self.collate_fn(found[at : at + each]) for at in range(0, len(found), each)], each)

    def as_of_the_user(self, records: list[Any]) -> Any:
        """A batch of these records as the user's loader would make it, for looks: generators draw as torch's seed says."""
        with seeded_as_torch_is(self.dataset, self.collate_fn):
            return self.together(records) if self.each else self.collate_fn(together(self.dataset, records))

    def put(self, ones: list[Any], rows: int) -> Any:
        """Batches of one, put together where they are alike."""
        if self.each:
            return kept_apart(ones)[0].batch
        opened = [to_front(open_containers(one), self.axis, strict=False) for one in ones]
        found = put_together(opened, rows, self.axis)
        groups = [
            Alike(ones[one.places[0]] if len(one.places) == 1 else self._closed(one.batch), one.places) for one in found
        ]
        return groups[0].batch if len(groups) == 1 else OneByOne(groups)

    def _closed(self, batch: Any) -> Any:
        return close_containers(from_front(batch, self.axis))

    def _one_by_one(self, records: list[Any], drawn: Drawn, generators: list[Any]) -> Any:
        ones = []
        for at in range(0, len(records), drawn.each):
            self._seed(drawn.seeds[at], generators)
            ones.append(self._alone(records[at : at + drawn.each]))
        return self.put(ones, drawn.each)

    def _alone(self, records: Any) -> Any:
        try:
            return self.collate_fn(records)
        except PreflightError:
            raise
        except Exception as error:
            raise BatchAxisError(
                f"collate_fn fails on one example by itself ({type(error).__name__}: {error}): expected a row for each. It is "
                "called for one example at a time, so that it mixes none. Let it take a list of one; leave broken examples out "
                "of the dataset before training; or, if it needs several and makes each row of its own example alone, vouch "
                "for it with DifferentialPrivacy(row_wise=['collate_fn'])."
            ) from error

    def _seed(self, seed: int, generators: list[Any]) -> None:
        seed_globals(seed)
        if generators:
            reseed(generators, seed)


def _nothing() -> None:
    """Where no read is repeated."""


def as_it_is(batch: Any) -> Any:
    """The ``collate_fn`` of a loader whose data set collates."""
    return batch


def first_of(batch: Any) -> tuple[Any, int | None]:
    """One batch for looks, and how many examples it has: the largest group of examples that are alike."""
    if isinstance(batch, Apart) or not isinstance(batch, OneByOne):
        return batch, None
    largest = max(batch.groups, key=lambda group: len(group.places))
    return largest.batch, len(largest.places)
