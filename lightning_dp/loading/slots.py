"""Where data sets, transforms and collate_fn keep values: what each held, what it holds now, and how it gets it back."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_dp.engines.user_code import is_file_of_the_users
from lightning_dp.loading.names_read import is_users_class
from lightning_dp.loading.own_generators import GENERATORS
from lightning_dp.mechanism.same import same

SMALL = 2**14
"""Tensors and arrays of at most so many numbers are compared, such as means and counts; of larger ones, a few places."""

LONGEST = 64
"""Containers of more elements are compared by their length alone."""

PLACES = 64
"""So many."""

State = dict[Any, tuple[Any, Any]]
"""By names: what is held, and a :class:`Content` if it is a tensor or array."""

ABSENT = object()
"""Nothing is held."""


class Content:
    """The numbers of a tensor or array: all of a small one, of a large one a few, spread evenly.

    Args:
        value: of which :meth:`takes` says that it has them.
    """

    def __init__(self, value: Any) -> None:
        self._size = value.numel() if isinstance(value, Tensor) else value.size
        self._every = 1 if self._size <= SMALL else self._size // PLACES
        self._row = max(1, self._size // max(1, len(value))) if value.ndim else 0
        plain = value.detach() if isinstance(value, Tensor) else value
        self._live: Any = plain.reshape(-1)[:: self._every]  # a view, as it is contiguous
        self._tensor = value if isinstance(value, Tensor) else None
        self._at = 0 if self._tensor is None else self._tensor.data_ptr()
        live: Any = self._live
        self._kept: Any = live.tobytes() if self._tensor is None else live.clone()

    @staticmethod
    def takes(value: Any) -> bool:
        """Whether a value is a tensor or array in memory."""
        if isinstance(value, Tensor):
            return value.layout == torch.strided and value.is_contiguous() and not value.is_meta
        plain = isinstance(value, np.ndarray) and not isinstance(value, np.memmap)
        return plain and value.flags.c_contiguous and not value.dtype.hasobject

    def differs(self) -> bool:
        """Whether it holds something else now."""
        if self._tensor is None:
            return bool(self._live.tobytes() != self._kept)
        if self._tensor.data_ptr() != self._at:
            return True
        return not (torch.equal(self._live, self._kept) or same(self._live, self._kept))

    def is_like(self, other: Content) -> bool:
        """Whether another had the same numbers in the same places."""
        if self._size != other._size or isinstance(self._kept, bytes) or isinstance(other._kept, bytes):
            return bool(self._size == other._size and self._kept is not None and self._kept == other._kept)
        return same(self._kept, other._kept)

    def rows(self) -> set[int]:
        """The rows in which it holds something else; -1 if it has no rows."""
        if self._row == 0:
            return {-1}
        before = self._before()
        moved = (self._live != before).cpu().numpy() if self._tensor is not None else self._live != before
        return {int(place) * self._every // self._row for place in moved.nonzero()[0]}

    def put_back(self) -> None:
        """Make a small one hold what it held."""
        if self._every == 1:
            self._live[...] = self._before()

    def _before(self) -> Any:
        return self._kept if self._tensor is not None else np.frombuffer(self._kept, self._live.dtype)


class Slots:
    """Something that holds values by names: what it held, and what it holds now."""

    is_container = False

    def __init__(self, name: str, live: Any) -> None:
        self.name, self.live = name, live
        self.take()

    def take(self) -> None:
        """Take note of what is held now."""
        self._held, self._raw = self.now(), tuple(self.values())
        self._contents = {key: Content(value) for key, value in self._held.items() if Content.takes(value)}

    def now(self) -> dict[Any, Any]:
        """What is held now."""
        return dict(self.live)

    def values(self) -> Iterable[Any]:
        """All that is held now, quickly."""
        found: Iterable[Any] = self.live.values()
        return found

    def differs(self) -> bool:
        """Whether anything else is held now, or the same with other contents."""
        now = tuple(self.values())
        if len(now) != len(self._raw) or not all(map(is_, now, self._raw)):
            return next(iter(self.changes()), None) is not None
        return any(content.differs() for content in self._contents.values())

    def changes(self) -> Iterable[tuple[Any, Any, Any]]:
        """What has changed: under which name or number, what was there and what is; contents as :class:`Content`."""
        now, held = self.now(), self._held
        for key, value in now.items():
            before = held.get(key, ABSENT)
            if value is before:
                content = self._contents.get(key)
                if content is not None and content.differs():
                    yield key, content, value
            elif not same(value, before):
                yield key, before, value
        yield from ((key, value, ABSENT) for key, value in held.items() if key not in now)

    def only_grows(self) -> bool:
        """Whether all that has changed is that one more entry of a dict is there."""
        changes = list(self.changes())
        return isinstance(self.live, dict) and len(changes) == 1 and changes[0][1] is ABSENT

    def state(self) -> State:
        """What is held now, for :meth:`put`."""
        return {key: (value, Content(value) if Content.takes(value) else None) for key, value in self.now().items()}

    def put_back(self) -> None:
        """Hold what was held when it was taken."""
        self.put({key: (value, self._contents.get(key)) for key, value in self._held.items()})

    def put(self, state: State) -> None:
        """Hold this: the same objects, and small ones with the same contents."""
        now = self.now()
        for key in now.keys() - state.keys():
            self.drop(key)
        for key, (value, content) in state.items():
            if now.get(key, ABSENT) is not value:
                self.hold(key, value)
            if content is not None and content.differs():
                content.put_back()

    def hold(self, key: Any, value: Any) -> None:
        """Hold a value under a name."""
        dict.__setitem__(self.live, key, value)

    def drop(self, key: Any) -> None:
        """Hold nothing under a name."""
        dict.pop(self.live, key, None)

    def is_cache(self, key: Any, before: Any, now: Any, own: set[int]) -> bool:
        """Whether the change is an example's own: a row of a tensor or array."""
        return isinstance(before, Content) and before.rows() <= own

    def attribute(self, key: Any) -> str | None:
        """The name by which code reads it, if it has one."""
        return str(key)

    def called(self, key: Any) -> str:
        """What people call it."""
        return f"{self.name}{key}"


class _OfAClass(Slots):
    """The body of a class."""

    @override
    def now(self) -> dict[Any, Any]:
        return {
            name: value for name, value in vars(self.live).items() if not name.startswith("__") and _is_value(value)
        }

    @override
    def values(self) -> Iterable[Any]:
        return [*vars(self.live).values()]

    @override
    def hold(self, key: Any, value: Any) -> None:
        type.__setattr__(self.live, key, value)

    @override
    def drop(self, key: Any) -> None:
        type.__delattr__(self.live, key)


class _OfSlots(Slots):
    """The slots of an object."""

    @override
    def now(self) -> dict[Any, Any]:
        names = [name for kind in type(self.live).__mro__ for name in _slot_names(kind)]
        return {name: getattr(self.live, name) for name in names if hasattr(self.live, name)}

    @override
    def values(self) -> Iterable[Any]:
        return self.now().values()

    @override
    def hold(self, key: Any, value: Any) -> None:
        object.__setattr__(self.live, key, value)

    @override
    def drop(self, key: Any) -> None:
        object.__delattr__(self.live, key)


class _OfNames(Slots):
    """Global names of a module that a function uses."""

    def __init__(self, name: str, live: dict[str, Any], names: tuple[str, ...]) -> None:
        self._names = names
        super().__init__(name, live)

    @override
    def now(self) -> dict[Any, Any]:
        return {name: self.live[name] for name in self._names if name in self.live and _is_value(self.live[name])}

    @override
    def values(self) -> Iterable[Any]:
        return map(self.live.get, self._names)


class _OfACell(Slots):
    """A variable that a function shares with the one around it."""

    @override
    def now(self) -> dict[Any, Any]:
        try:
            value = self.live.cell_contents
        except ValueError:  # nothing is in it
            return {}
        return {"": value} if _is_value(value) else {}

    @override
    def values(self) -> Iterable[Any]:
        return self.now().values()

    @override
    def hold(self, key: Any, value: Any) -> None:
        self.live.cell_contents = value

    @override
    def drop(self, key: Any) -> None:
        del self.live.cell_contents

    @override
    def attribute(self, key: Any) -> str | None:
        return None


class _OfADict(Slots):
    """A dict, which may be a cache; of one with many entries, nothing."""

    is_container = True

    @override
    def now(self) -> dict[Any, Any]:
        return dict(self.live) if len(self.live) <= LONGEST else {}

    @override
    def values(self) -> Iterable[Any]:
        found: Iterable[Any] = self.live.values() if len(self.live) <= LONGEST else ()
        return found

    @override
    def is_cache(self, key: Any, before: Any, now: Any, own: set[int]) -> bool:
        return before is ABSENT or now is ABSENT or key in own or super().is_cache(key, before, now, own)

    @override
    def attribute(self, key: Any) -> str | None:
        return None

    @override
    def called(self, key: Any) -> str:
        return f"{self.name}[{key!r}]"


class _OfAList(_OfADict):
    """A list, a deque or a set; of a long one, its length."""

    @override
    def now(self) -> dict[Any, Any]:
        if len(self.live) > LONGEST:
            return {"length": len(self.live)}
        return dict.fromkeys(self.live, True) if isinstance(self.live, set) else dict(enumerate(self.live))

    @override
    def values(self) -> Iterable[Any]:
        found: Iterable[Any] = self.live if len(self.live) <= LONGEST else (len(self.live),)
        return found

    @override
    def put(self, state: State) -> None:
        if "length" in state:  # it is long, and stays as it is
            return
        self.live.clear()
        if isinstance(self.live, set):
            self.live.update(state)
            return
        self.live.extend(value for value, _ in state.values())
        super().put(state)

    @override
    def hold(self, key: Any, value: Any) -> None:
        self.live[key] = value

    @override
    def called(self, key: Any) -> str:
        return self.name

    @override
    def is_cache(self, key: Any, before: Any, now: Any, own: set[int]) -> bool:
        if isinstance(self.live, set):
            return key in own
        grows = before is ABSENT or now is ABSENT
        return not grows and (key in own or Slots.is_cache(self, key, before, now, own))


def slots_of(found: list[Any]) -> Iterable[Slots]:
    """Whatever holds values among these."""
    names = _names_of_containers(found)
    for one in found:
        if isinstance(one, GENERATORS):
            continue
        if isinstance(one, type):
            if is_users_class(one):
                yield _OfAClass(f"{one.__name__}.", one)
        elif isinstance(one, types.FunctionType):
            if is_file_of_the_users(one.__code__.co_filename):
                used = tuple(name for name in one.__code__.co_names if name in one.__globals__)
                yield _OfNames("", one.__globals__, used)
                cells = zip(one.__code__.co_freevars, one.__closure__ or (), strict=False)
                yield from (_OfACell(f"{name} of {one.__qualname__}", cell) for name, cell in cells)
        elif isinstance(one, dict):
            yield _OfADict(names.get(id(one), type(one).__name__), one)
        elif isinstance(one, (list, deque, set)) and not isinstance(one, Dataset):
            yield _OfAList(names.get(id(one), type(one).__name__), one)
        elif is_users_class(type(one)):
            if isinstance(one, nn.Module):
                yield from (Slots(f"{type(one).__name__}.", table) for table in (one._buffers, one._parameters))
            if isinstance(getattr(one, "__dict__", None), dict):
                yield Slots(f"{type(one).__name__}.", one.__dict__)
            if any(_slot_names(kind) for kind in type(one).__mro__):
                yield _OfSlots(f"{type(one).__name__}.", one)


def _names_of_containers(found: list[Any]) -> dict[int, str]:
    """By what name an object of the user's knows a container."""
    return {
        id(value): f"{type(one).__name__}.{name}"
        for one in found
        if isinstance(getattr(one, "__dict__", None), dict) and not isinstance(one, (type, types.FunctionType))
        for name, value in vars(one).items()
        if isinstance(value, (dict, list, deque, set))
    }


def _slot_names(kind: type) -> list[str]:
    named = kind.__dict__.get("__slots__", ())
    names = [named] if isinstance(named, str) else list(named)
    return [name for name in names if not name.startswith("__")]


def _is_value(value: Any) -> bool:
    return not callable(value) and not isinstance(value, (types.ModuleType, property, classmethod, staticmethod))


def _same_small(now: Any, before: Any) -> bool:
    if isinstance(now, Tensor):
        return torch.equal(now, before) or same(now, before)
    return bool(np.array_equal(now, before)) or same(now, before)


def _is_small(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.numel() <= SMALL and value.layout == torch.strided
    return isinstance(value, np.ndarray) and value.size <= SMALL and not value.dtype.hasobject


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value.copy()
