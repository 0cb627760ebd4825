"""Containers of the user's own, taken apart into something that all stages can walk through, and put together again."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.simple import is_simple, mapped

_PLAIN = (str, bytes, int, float, type(None))


@dataclass(frozen=True)
class _Place:
    """Where a part belongs: ``container[key]`` or, for an attribute, ``container.key``."""

    key: Any
    is_attribute: bool

    def __str__(self) -> str:
        return f".{self.key}" if self.is_attribute else f"[{self.key!r}]"


@dataclass(frozen=True)
class ContainerParts:
    """A container in parts. PyTorch's tree functions walk through it like through a dict.

    Attributes:
        template: the container itself, for whatever of it is not a part.
        places: where the parts belong.
        parts: the parts.
    """

    template: Any
    places: tuple[_Place, ...]
    parts: tuple[Any, ...]

    def put_together(self) -> Any:
        """A container of the same type with these parts."""
        whole = copy.copy(self.template)
        if getattr(self.template, "__dict__", None) is self.template:
            whole.__dict__ = whole  # a dict whose items are its attributes: a copy's would be the whole batch's
        for place, part in zip(self.places, self.parts, strict=True):
            if place.is_attribute:
                object.__setattr__(whole, place.key, part)
            else:
                whole[place.key] = part
        return whole


class _Template:
    """A container in the structure of a nest: equal to another that could stand in its place."""

    def __init__(self, container: Any) -> None:
        self.container = container

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Template):
            return False
        return self.container is other.container or self._left() == other._left()

    __hash__ = None  # type: ignore[assignment]  # a container may change

    def _left(self) -> tuple[type, list[tuple[str, str]]]:
        """Its type, and what of it is no part: texts and numbers in attributes."""
        held = getattr(self.container, "__dict__", {})
        plain = {} if held is self.container else held
        return type(self.container), [(name, repr(one)) for name, one in plain.items() if isinstance(one, _PLAIN)]


pytree.register_pytree_node(
    ContainerParts,
    lambda opened: (list(opened.parts), (_Template(opened.template), opened.places)),
    lambda parts, context: ContainerParts(context[0].container, context[1], tuple(parts)),
    flatten_with_keys_fn=lambda opened: (
        [(_PathKey(place), part) for place, part in zip(opened.places, opened.parts, strict=True)],
        (_Template(opened.template), opened.places),
    ),
)


@dataclass(frozen=True)
class _PathKey:
    """What ``keystr`` shows of a place, and the ``key`` by which other code compares."""

    place: _Place

    @property
    def key(self) -> Any:
        return self.place.key

    def get(self, opened: ContainerParts) -> Any:
        """The part at this place."""
        return opened.parts[opened.places.index(self.place)]

    def __str__(self) -> str:
        return str(self.place)


def open_containers(nest: Any) -> Any:
    """``nest`` with every container that PyTorch's tree functions do not know in parts.

    Taken apart are mappings that are not dicts (``UserDict``, Hugging Face's ``BatchEncoding``), subclasses of dict,
    dataclasses, and objects of plain Python classes that hold tensors. What they hold besides, such as the tokenizer's
    own record in a ``BatchEncoding``, is a part as well: nothing of a container is left for all examples to see, but
    single strings and numbers and ``None``. An object with a part that nobody can look into stays closed.

    Example:
        >>> from collections import UserDict
        >>> opened = open_containers(UserDict(x=1.0))
        >>> pytree.tree_map(lambda leaf: leaf + 1, opened).put_together()
        {'x': 2.0}
    """
    if isinstance(nest, ContainerParts) or is_simple(nest):
        return nest
    if _is_node(nest):
        children, structure = _one_level(nest)
        return pytree.tree_unflatten([open_containers(child) for child in children], structure)
    places = _places_of(nest)
    if places is None:
        return nest
    parts = tuple(
        open_containers(getattr(nest, place.key) if place.is_attribute else nest[place.key]) for place in places
    )
    is_record = isinstance(nest, Mapping) or dataclasses.is_dataclass(nest)
    if not is_record and not (_holds_a_tensor(parts) and all(map(_is_clear, parts))):
        return nest
    return ContainerParts(nest, tuple(places), parts)


def close_containers(nest: Any) -> Any:
    """The inverse of :func:`open_containers`, for any nest of the same structure."""
    if isinstance(nest, ContainerParts):
        opened = dataclasses.replace(nest, parts=tuple(close_containers(part) for part in nest.parts))
        return opened.put_together()
    if is_simple(nest):
        return mapped(lambda part: part, nest)
    if _is_node(nest):
        children, structure = _one_level(nest)
        return pytree.tree_unflatten([close_containers(child) for child in children], structure)
    return nest


def own_copy(batch: Any) -> Any:
    """A copy of a batch, or of a part of one, that can be written into without anybody else seeing it.

    Raises:
        TypeError: an object in it cannot be copied.
    """

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf if isinstance(leaf, _PLAIN) else copy.deepcopy(leaf)

    return close_containers(pytree.tree_map(copied, open_containers(batch)))


def _is_node(nest: Any) -> bool:
    return pytree._get_node_type(nest) in pytree.SUPPORTED_NODES


def _one_level(node: Any) -> tuple[list[Any], Any]:
    return pytree.tree_flatten(node, is_leaf=lambda inner: inner is not node)


def _places_of(container: Any) -> list[_Place] | None:
    """The parts of a container, or ``None`` if it is none."""
    if isinstance(container, (Tensor, *_PLAIN, type)):
        return None
    if callable(getattr(type(container), "to_data_list", None)):
        return None  # graphs joined into one: its tensors have no rows of examples
    if isinstance(container, MutableMapping):
        attributes = _attributes(container)
        inner = [name for name in attributes if not isinstance(getattr(container, name), _PLAIN) and name != "data"]
        return [*(_Place(key, False) for key in container), *(_Place(name, True) for name in inner)]
    if dataclasses.is_dataclass(container):
        names = dict.fromkeys([*(field.name for field in dataclasses.fields(container)), *_attributes(container)])
        return [_Place(name, True) for name in names]
    kinds: tuple[Any, ...] = type(container).__mro__
    if kinds[0].__setattr__ is not object.__setattr__ or any(map(_is_foreign, kinds)):
        return None
    return [_Place(name, True) for name in _attributes(container)] or None


def _attributes(container: Any) -> Iterable[str]:
    own = getattr(container, "__dict__", {})
    return () if own is container else tuple(own)


def _is_foreign(kind: Any) -> bool:
    """Whether instances may hold what their ``__dict__`` does not show: a class written in C, or one with slots."""
    return kind is not object and (not kind.__flags__ & _HEAP_TYPE or bool(kind.__dict__.get("__slots__")))


_HEAP_TYPE = 1 << 9
"""``Py_TPFLAGS_HEAPTYPE``: the class was made by a ``class`` statement."""


def _holds_a_tensor(parts: Iterable[Any]) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(list(parts)))


def _is_clear(part: Any) -> bool:
    return all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in pytree.tree_leaves(part))
