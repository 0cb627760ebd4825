"""What a data set, its transforms and collate_fn keep from one read to the next: found, and refused unless it is a cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from torch.utils.data import ConcatDataset, Subset

from lightning_dp.engines.user_code import Line
from lightning_dp.engines.writes import line_that_changes
from lightning_dp.errors import PreflightError
from lightning_dp.loading.likeness import alike, can_be_compared
from lightning_dp.loading.names_read import names_read
from lightning_dp.loading.own_generators import NEAR, reachable
from lightning_dp.loading.slots import ABSENT, Slots, State, slots_of


class KeptByData:
    """Watches, read by read, what code of the user's keeps in attributes, containers, globals and small tensors.

    What may change: an entry that is found under the number of the example; a new entry of a dict, and one that is gone
    (caches); what was not there before and any other example would have set alike, or an object that is opened when it is
    first needed, once in a process; and what no code of the user's reads (a count for a print-out). Everything else could
    carry one example into what is made of another, and is refused.

    Not seen are objects of libraries from within, elements of containers of more than 64, and all but a few places of tensors
    and arrays of more than :data:`lightning_dp.loading.slots.SMALL` numbers. Reads that are repeated look for what comes of
    those, see :mod:`lightning_dp.loading.repeated_reads`.

    Args:
        dataset: the user's.
        owners: whatever else runs for each example, such as ``collate_fn``.
    """

    def __init__(self, dataset: Any, *owners: Any) -> None:
        self._dataset, self._owners = dataset, owners
        self._once: set[tuple[int, int, Any]] = set()
        self._slots: list[Slots] = []
        self.found: list[Any] = []
        self._left: dict[tuple[int, Any], Any] = {}
        self.has_changed = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_once": set(), "_slots": [], "found": []}

    def look(self) -> None:
        """Take note of what is kept now."""
        self.found = reachable(self._dataset, *self._owners, most=NEAR)
        self._slots = list(slots_of(self.found))

    def check(self, index: int, again: Callable[[int], object], *, afresh: bool = False) -> None:
        """After example ``index`` was read: refuse what it has left.

        Args:
            index: of the data set.
            again: reads the example with this number once more, as this one was read.
            afresh: whether caches are emptied afterwards, and no two examples may fill one under the same key with different
                values.

        Raises:
            PreflightError: something was left that could reach what is made of other examples, with the line.
        """
        changed = [slots for slots in self._slots if slots.differs()]
        if not changed:
            return
        self.has_changed = True
        own = set(_numbers_of(self._dataset, index))
        here = _Changes(changed, partial(self._others, index, again))
        for slots in changed:
            for key, before, now in list(slots.changes()):
                shares = afresh and slots.is_container and key not in own and not self._is_new(slots, key, now)
                if shares or not self._may_change(slots, key, before, now, own, here):
                    here.put_back()
                    raise _keeps(slots.called(key), line_that_changes(partial(again, index), slots.differs))
        if afresh and all(slots.is_container and slots.only_grows() for slots in changed):  # caches, and nothing beside
            here.put_back()
        for slots in changed:
            slots.take()

    def _is_new(self, slots: Slots, key: Any, now: Any) -> bool:
        """Whether no other example has left another value under a key."""
        return now is ABSENT or alike(self._left.setdefault((id(slots.live), key), now), now)

    def _may_change(self, slots: Slots, key: Any, before: Any, now: Any, own: set[int], here: _Changes) -> bool:
        if slots.is_cache(key, before, now, own) or not self._is_read(slots.attribute(key)):
            return True
        once = (os.getpid(), id(slots.live), key)
        if once in self._once:
            return False
        self._once.add(once)
        if not slots.is_container and now is not ABSENT and not can_be_compared(now):
            return True  # a file, say, that is opened when it is first needed
        return here.would_be_the_same(slots, key)

    def _others(self, index: int, again: Callable[[int], object]) -> bool:
        """Read another example in the place of this one."""
        for other in range(index + 1, index + 4):
            with suppress(Exception):
                again(other % len(self._dataset))
                return True
        return False

    def _is_read(self, name: str | None) -> bool:
        """Whether code that runs for an example reads what has this name."""
        return name is None or name in names_read(self.found)


class _Changes:
    """What one read has left, beside what another would have left in its place."""

    def __init__(self, changed: list[Slots], read_another: Callable[[], bool]) -> None:
        self._changed, self._read_another = changed, read_another
        self._both: dict[int, tuple[State, State]] | None = None

    def put_back(self) -> None:
        """Undo what was left."""
        for slots in self._changed:
            slots.put_back()

    def would_be_the_same(self, slots: Slots, key: Any) -> bool:
        """Whether another example would have left the same under this key."""
        if self._both is None:
            mine = {id(one): one.state() for one in self._changed}
            self.put_back()
            try:
                done = self._read_another()
                theirs = {id(one): one.state() if done else {} for one in self._changed}
            finally:
                for one in self._changed:
                    one.put(mine[id(one)])
            self._both = {place: (mine[place], theirs[place]) for place in mine}
        (value, content), (other, others) = (state.get(key, (ABSENT, None)) for state in self._both[id(slots)])
        if content is None or others is None:
            return bool(value is other or (value is not ABSENT and other is not ABSENT and alike(value, other)))
        return bool(content.is_like(others))


def _numbers_of(dataset: Any, index: int) -> Iterable[int]:
    """The numbers that an example has in a data set and in those that it is made of."""
    yield index
    if isinstance(dataset, Subset):
        yield from _numbers_of(dataset.dataset, int(dataset.indices[index]))
    elif isinstance(dataset, ConcatDataset):
        for part, end in zip(dataset.datasets, dataset.cumulative_sizes, strict=True):
            if index < end:
                yield from _numbers_of(part, index - (end - len(part)))  # type: ignore[arg-type]  # it has a length, or no end
                return


def _keeps(what: str, line: Line | None) -> PreflightError:
    return PreflightError(
        f"reading an example changes {what}{'' if line is None else f' ({line})'}: expected what is made of an example to "
        "follow from the example alone. What is kept of one would reach others, past every clip norm. Compute means and "
        "other statistics from public data before training; keep what a read needs for itself in local variables; a cache may "
        "be kept in a dict, under the number of the example. If no later read depends on it, vouch for that with "
        "DifferentialPrivacy(row_wise=['__getitem__'])."
    )
