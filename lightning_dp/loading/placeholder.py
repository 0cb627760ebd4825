"""A batch that holds nobody's data, in the shape of one that does."""

from __future__ import annotations

import copy
import enum
import types
import weakref
from collections.abc import Callable, MutableMapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.batches.microbatch import Element, Shared


def without_content(batch: Any, otherwise: Callable[[Any], Any] | None = None) -> Any:
    """``batch`` with its content gone: zeros for numbers, ``True`` for truth values, ``""`` for texts.

    Nothing but structure, shapes, types and device are left of the examples. (Truth values are nearly always masks, and a
    mask that hides everything makes attention divide by zero.) What all examples share by ``batch_axis`` is public and stays.

    Args:
        batch: any nest of tensors, numbers and texts.
        otherwise: what becomes of a leaf of another type; ``None`` refuses it.

    Raises:
        TypeError: a leaf is of another type, whose content nobody could remove.

    Example:
        >>> without_content({"x": torch.ones(1, 2), "name": ["Ada"], "mask": torch.tensor([False])})
        {'x': tensor([[0., 0.]]), 'name': [''], 'mask': tensor([True])}
    """

    def emptied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.ones_like(leaf) if leaf.dtype == torch.bool else torch.zeros_like(leaf)
        if leaf is None or isinstance(leaf, Shared):
            return leaf
        if type(leaf) in _EMPTY:
            return _EMPTY[type(leaf)]
        if isinstance(leaf, Element):
            return Element(close_containers(without_content(open_containers(leaf.content), otherwise)))
        return emptied_or_refused(leaf, strictly=True) if otherwise is None else otherwise(leaf)

    return pytree.tree_map(emptied, batch)


_EMPTY: dict[type, Any] = {str: "", bytes: b"", int: 0, float: 0.0, bool: False, complex: 0j}


class Withheld:
    """Stands, in a hook's batch, for something whose content cannot be taken out. It can be passed on and not looked into."""

    def __init__(self, what: str) -> None:
        self.__dict__["_what"] = what

    def __repr__(self) -> str:
        return f"<{self.__dict__['_what']}, withheld>"

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse()

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError(
            f"a hook looks into its batch, where {self.__dict__['_what']} is withheld: under differential privacy a hook's "
            "batch has the type of training_step's and nobody's data, and the content of this could not be taken out: expected "
            "the hook to do without. Put what is done with examples into training_step, on_after_batch_transfer or the dataset."
        )

    __getitem__ = __setitem__ = __setattr__ = __len__ = __contains__ = _refuse


def emptied_object(given: Any) -> Any:
    """A copy of an object of any class with the tensors, arrays, numbers and texts inside it emptied; else :class:`Withheld`.

    For batches that nobody can take apart, such as a graph library's. Numbers and texts in attributes that begin with an
    underscore are kept: such classes keep their own books there (how many graphs there are).
    """
    try:
        copied = copy.deepcopy(given)
        found = _Emptier()
        emptied = found.emptied(copied)
    except Exception:
        return Withheld(f"a {type(given).__name__}")
    return emptied if found.tensors else Withheld(f"a {type(given).__name__}")


def emptied_or_refused(given: Any, strictly: bool = False) -> Any:
    """:func:`emptied_object` of an object that can be emptied, and with ``strictly`` of none.

    Raises:
        TypeError: it cannot be, or may not.
    """
    emptied = Withheld("") if strictly else emptied_object(given)
    if isinstance(emptied, Withheld):
        raise TypeError(
            f"a batch holds a {type(given).__name__}: expected tensors, numbers and texts in dicts, lists and tuples. Its "
            "content could not be kept from a step that must not see it; let collate_fn turn it into tensors."
        )
    return emptied


class _Emptier:
    """Walks through what an object holds and empties it in place."""

    def __init__(self) -> None:
        self.tensors = 0
        self._seen: dict[int, Any] = {}

    def emptied(self, thing: Any) -> Any:
        if type(thing) in _EMPTY:
            return _EMPTY[type(thing)]
        if thing is None or isinstance(thing, _HARMLESS):
            return thing
        if id(thing) in self._seen:
            return thing
        self._seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            self.tensors += 1
            return torch.ones_like(thing) if thing.dtype == torch.bool else torch.zeros_like(thing)
        if isinstance(thing, np.ndarray):
            return np.zeros_like(thing)
        if isinstance(thing, (set, frozenset)):
            return type(thing)()
        if type(thing) in (list, tuple):
            return type(thing)(self.emptied(one) for one in thing)
        held = getattr(thing, "__dict__", None)
        slots = [name for kind in type(thing).__mro__ for name in _slots(kind) if hasattr(thing, name)]
        if isinstance(thing, MutableMapping):
            for key in list(thing):
                thing[key] = self.emptied(thing[key])
        elif held is None and not slots:
            return None  # written in C, or a number of a library's own: nobody knows what it holds
        for name in [*(held or ()), *slots]:
            value = held[name] if held is not None and name in held else getattr(thing, name)
            if name.startswith("_") and type(value) in _EMPTY:
                continue
            if held is not None and name in held:
                held[name] = self.emptied(value)
            else:
                object.__setattr__(thing, name, self.emptied(value))
        return thing


_HARMLESS = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, enum.Enum, weakref.ref,
    torch.dtype, torch.device, torch.Size, Shared,
)  # fmt: skip


def held_inside(thing: Any, depth: int = 6) -> list[tuple[str, Any]]:
    """Where an object holds tensors, arrays, numbers and texts, and what; the thing itself if it is none of a class."""
    found: list[tuple[str, Any]] = []
    _look_inside(thing, "", depth, found, set())
    return found


def _look_inside(thing: Any, where: str, depth: int, found: list[tuple[str, Any]], seen: set[int]) -> None:
    plain = thing is None or type(thing) in _EMPTY or isinstance(thing, (Tensor, np.ndarray, *_HARMLESS))
    held = {} if plain else getattr(thing, "__dict__", {})
    items = list(thing.items()) if isinstance(thing, MutableMapping) else []
    items = list(enumerate(thing)) if type(thing) in (list, tuple) else items
    if plain or depth == 0 or not (held or items):
        found.append((where, thing))
    elif id(thing) not in seen:
        seen.add(id(thing))
        for key, value in items:
            _look_inside(value, f"{where}[{key!r}]", depth - 1, found, seen)
        for name, value in held.items() if held is not thing else ():
            _look_inside(value, f"{where}.{name}", depth - 1, found, seen)


def _slots(kind: type) -> list[str]:
    named = kind.__dict__.get("__slots__", ())
    return [named] if isinstance(named, str) else [name for name in named if name not in ("__dict__", "__weakref__")]
