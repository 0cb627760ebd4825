"""Places where Python keeps state: what each held, whether it holds something else now, and how it gets it back."""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from operator import is_
from types import CellType, GeneratorType
from typing import Any, Protocol

import numpy as np
import torch
from typing_extensions import override

from lightning_dp.mechanism.instead import Instead
from lightning_dp.mechanism.same import same

_ABSENT = object()


class Place(Protocol):
    """Something that holds other things by name, by number or at all.

    Compared is which objects it holds: what those hold in turn is a place of its own. Numbers and texts of the same value are
    one.

    Attributes:
        where: its name, for people.
    """

    where: str

    def differs(self) -> bool:
        """Whether it holds something else than when it was made."""

    def put_back(self) -> None:
        """Make it hold what it held."""

    def held(self) -> Any:
        """What it holds now, to be compared."""


def _one(now: Any, before: Any) -> bool:
    """Whether two things may stand for each other."""
    return now is before or (type(now) is type(before) and isinstance(now, _VALUES) and same(now, before))


_VALUES = (int, float, complex, str, bytes, range, slice, np.generic, torch.dtype, torch.device, torch.Size)


def under(value: Any) -> Any:
    """What would stand in an object's ``__dict__`` without this package."""
    while type(value) is Instead:
        value = value.before
    return value


class DictPlace(Place):
    """A dict, or the ``__dict__`` of an object.

    Args:
        where: its name.
        live: itself.
        ignored: gives names that do not count.
        named: what a module's own names begin with, if these are its attributes or tensors.
    """

    def __init__(
        self,
        where: str,
        live: dict[Any, Any],
        ignored: Callable[[], Collection[str]] = lambda: (),
        named: str | None = None,
    ) -> None:
        self.where, self._live, self._ignored, self.named = where, live, ignored, named
        self.take()

    def take(self) -> None:
        """Hold it to what it holds now."""
        self._keys, self._values = tuple(self._live), tuple(self._live.values())

    @override
    def differs(self) -> bool:
        live = self._live
        if len(live) == len(self._keys) and all(map(is_, live, self._keys)):
            if all(map(is_, live.values(), self._values)):
                return False
            pairs = zip(self._keys, live.values(), self._values, strict=True)
            moved = [
                key
                for key, now, before in pairs
                if now is not before and not _one(now, before) and under(now) is not under(before)
            ]
            return bool(moved) and not set(self._ignored()).issuperset(moved)
        ignored = self._beside()
        kept = {key: value for key, value in zip(self._keys, self._values, strict=True) if key not in ignored}
        now = {key: value for key, value in live.items() if key not in ignored}
        return list(now) != list(kept) or not all(map(_one, now.values(), kept.values()))

    def _beside(self) -> set[Any]:
        """Names that do not count, and those under which only something of this package's own has come or gone."""
        before, live = dict(zip(self._keys, self._values, strict=True)), self._live
        ours = [key for table in (before, live) for key, value in table.items() if type(value) is Instead]
        return {*self._ignored(), *(key for key in ours if under(before.get(key)) is under(live.get(key)))}

    @override
    def held(self) -> Any:
        return {key: value for key, value in self._live.items() if key not in self._ignored()}

    def changed(self) -> list[Any]:
        """What it held and no longer does, and what it holds since."""
        before, live = dict(zip(self._keys, self._values, strict=True)), self._live
        names = [key for key in {**before, **live} if live.get(key, _ABSENT) is not before.get(key, _ABSENT)]
        ignored = self._ignored()
        names = [key for key in names if key not in ignored]
        return [table[key] for key in names for table in (before, live) if key in table]

    def moved(self) -> dict[str, Any]:
        """What has changed, by name, as it is now."""
        before = dict(zip(self._keys, self._values, strict=True))
        names = [key for key in {**before, **self._live} if key not in self._beside()]
        now = self._live
        return {
            key: now.get(key, _ABSENT) for key in names if not _one(now.get(key, _ABSENT), before.get(key, _ABSENT))
        }

    @override
    def put_back(self) -> None:
        live, ignored = self._live, self._beside()
        kept = {key: value for key, value in zip(self._keys, self._values, strict=True) if key not in ignored}
        kind: Any = OrderedDict if isinstance(live, OrderedDict) else dict
        for key in [key for key in live if key not in kept and key not in ignored]:
            kind.__delitem__(live, key)
        in_order = [key for key in live if key not in ignored] == list(kept)
        for key, value in kept.items():
            if not in_order:
                kind.pop(live, key, None)
            if live.get(key, _ABSENT) is not value:
                kind.__setitem__(live, key, value)


class ListPlace(Place):
    """A list or a deque."""

    def __init__(self, where: str, live: Any) -> None:
        self.where, self._live, self._items = where, live, tuple(live)

    @override
    def differs(self) -> bool:
        live, items = self._live, self._items
        return len(live) != len(items) or not (all(map(is_, live, items)) or all(map(_one, live, items)))

    @override
    def held(self) -> Any:
        return list(self._live)

    @override
    def put_back(self) -> None:
        kind: Any = deque if isinstance(self._live, deque) else list
        kind.clear(self._live)
        kind.extend(self._live, self._items)


class SetPlace(Place):
    """A set."""

    def __init__(self, where: str, live: set[Any]) -> None:
        self.where, self._live, self._items = where, live, frozenset(live)

    @override
    def differs(self) -> bool:
        return self._live != self._items

    @override
    def held(self) -> Any:
        return set(self._live)

    @override
    def put_back(self) -> None:
        set.clear(self._live)
        set.update(self._live, self._items)


class SlotsPlace(Place):
    """The slots of an object."""

    def __init__(self, where: str, live: Any, names: list[str]) -> None:
        self.where, self._live, self._names = where, live, names
        self._values = [getattr(live, name, _ABSENT) for name in names]

    @staticmethod
    def names(thing: Any) -> list[str]:
        """The slots that an object has."""
        found = []
        for kind in type(thing).__mro__:
            named = kind.__dict__.get("__slots__", ())
            found += [named] if isinstance(named, str) else list(named)
        return [name for name in found if name not in ("__dict__", "__weakref__") and not name.startswith("__")]

    @override
    def differs(self) -> bool:
        return not all(_one(getattr(self._live, n, _ABSENT), v) for n, v in zip(self._names, self._values, strict=True))

    @override
    def held(self) -> Any:
        return [getattr(self._live, name, _ABSENT) for name in self._names]

    @override
    def put_back(self) -> None:
        for name, value in zip(self._names, self._values, strict=True):
            if value is not _ABSENT:
                object.__setattr__(self._live, name, value)
            elif hasattr(self._live, name):
                object.__delattr__(self._live, name)


class ClassPlace(Place):
    """The attributes in a class body that are no methods."""

    def __init__(self, where: str, kind: type) -> None:
        self.where, self._kind = where, kind
        self._kept = self._now()

    def _now(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self._kind).items() if not name.startswith("__")}

    @override
    def differs(self) -> bool:
        now, kept = vars(self._kind), self._kept
        for name, value in kept.items():
            if now.get(name, _ABSENT) is not value:
                break
        else:
            if len(now) == self._size(now):
                return False
        there = self._now()
        return there.keys() != kept.keys() or not all(_one(there[name], value) for name, value in kept.items())

    def _size(self, now: Any) -> int:
        return len(self._kept) + len([name for name in now if name.startswith("__")])

    @override
    def held(self) -> Any:
        return self._now()

    @override
    def put_back(self) -> None:
        for name in self._now().keys() - self._kept.keys():
            type.__delattr__(self._kind, name)
        for name, value in self._kept.items():
            if vars(self._kind).get(name, _ABSENT) is not value:
                type.__setattr__(self._kind, name, value)


class NamesPlace(Place):
    """The global names of a module that its functions use."""

    def __init__(self, where: str, live: dict[str, Any], names: set[str]) -> None:
        self.where, self._live = where, live
        self._kept = {name: live[name] for name in names}

    @override
    def differs(self) -> bool:
        live = self._live
        return not all(_one(live.get(name, _ABSENT), value) for name, value in self._kept.items())

    @override
    def held(self) -> Any:
        return {name: self._live.get(name, _ABSENT) for name in self._kept}

    @override
    def put_back(self) -> None:
        self._live.update(self._kept)


class CellPlace(Place):
    """A variable that a function shares with the one around it."""

    def __init__(self, where: str, cell: CellType) -> None:
        self.where, self._cell = where, cell
        self._kept = self._now()

    def _now(self) -> Any:
        try:
            return self._cell.cell_contents
        except ValueError:  # nothing is in it
            return _ABSENT

    @override
    def differs(self) -> bool:
        return not _one(self._now(), self._kept)

    @override
    def held(self) -> Any:
        return self._now()

    @override
    def put_back(self) -> None:
        if self._kept is _ABSENT:
            del self._cell.cell_contents
        else:
            self._cell.cell_contents = self._kept


class GeneratorPlace(Place):
    """A random generator."""

    def __init__(self, where: str, live: Any) -> None:
        self.where, self._live = where, live
        self._kept = self._now()

    @staticmethod
    def takes(thing: Any) -> bool:
        """Whether a thing is one."""
        return isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random))

    def _now(self) -> Any:
        live = self._live
        if isinstance(live, torch.Generator):
            return live.get_state()
        if isinstance(live, np.random.Generator):
            return live.bit_generator.state
        if isinstance(live, np.random.RandomState):
            return live.get_state()
        return live.getstate()

    @override
    def differs(self) -> bool:
        return not same(self._now(), self._kept)

    @override
    def held(self) -> Any:
        return self._now()

    @override
    def put_back(self) -> None:
        live = self._live
        if isinstance(live, np.random.Generator):
            live.bit_generator.state = self._kept
        elif isinstance(live, random.Random):
            live.setstate(self._kept)
        else:
            live.set_state(self._kept)


class OpaquePlace(Place):
    """An iterator, which can be seen to have moved, and cannot be moved back."""

    def __init__(self, where: str, live: Any) -> None:
        self.where, self._live = where, live
        self._kept = self._now()

    def _now(self) -> Any:
        if isinstance(self._live, GeneratorType):
            frame = self._live.gi_frame
            return None if frame is None else (frame.f_lasti, dict(frame.f_locals))
        return repr(self._live)

    @override
    def differs(self) -> bool:
        return not same(self._now(), self._kept)

    @override
    def held(self) -> Any:
        return self._now()

    @override
    def put_back(self) -> None:
        """Cannot be done; whoever finds that it differs refuses."""
