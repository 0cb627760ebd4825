"""Batches whose tensors do not all have their examples on the first axis: where they are is said by the user."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import own_copy
from lightning_dp.batches.microbatch import BatchAxisError, Element, Shared
from lightning_dp.validate import shown

Axis = int | Literal["list"]
"""The axis of the examples, or ``"list"``: a list or tuple whose i-th element is all that belongs to the i-th example."""

BatchAxis = Axis | Literal["each"] | Mapping[str, Axis | None]
"""The axis of the examples: of all tensors, or by field (``"inputs"``, ``"inputs.mask"``, ``"0"``); ``None`` if shared.

``"each"`` has every example collated by itself, so that nothing needs to be said about the batch."""


def check_batch_axis_argument(batch_axis: object) -> None:
    """Refuse what is not an axis or a mapping from fields to axes.

    Raises:
        ValueError: see the message.
    """
    values = list(batch_axis.values()) if isinstance(batch_axis, Mapping) else [batch_axis]
    names = list(batch_axis) if isinstance(batch_axis, Mapping) else []
    allowed = (isinstance(batch_axis, str) and batch_axis == "each") or all(
        _is_axis(value) or (value is None and names) for value in values
    )
    if not allowed or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"batch_axis={shown(batch_axis)}: expected the axis of the examples, such as 1, 'list' for a list with one element "
            "for each example, or a mapping from fields to these, such as {'inputs': 1, 'positions': None}; None marks a part "
            "that all examples share. 'each' has every example collated by itself."
        )


def to_front(batch: Any, batch_axis: BatchAxis, *, strict: bool = True) -> Any:
    """``batch`` with every tensor's examples on its first axis, which is how all further stages see it.

    A tensor that all examples share is repeated for each of them (a view, without memory), and any other object is marked as
    :class:`~lightning_dp.batches.microbatch.Shared`. It enters every example's
    gradient, so it must not depend on the examples: a table of positions, class weights, a mask of the causal kind.

    Args:
        batch: any nest of tensors.
        batch_axis: where the examples are. Fields that it does not name have them on the first axis, and so have tensors
            with too few axes for a number that holds for all.
        strict: whether every field that is named has to be there.

    Raises:
        BatchAxisError: a field that is named is not there, or a tensor does not have the axis.
    """
    if batch_axis in (0, "each"):
        return batch
    for name in _shared(batch_axis):
        batch = _at(batch, tuple(name.split(".")), _marked_as_shared)
    lists = [""] if batch_axis == "list" else _lists(batch_axis)
    for name in lists:
        batch = _at(batch, tuple(name.split(".")) if name else (), partial(_elements, name=name))
    paths, structure = pytree.tree_flatten_with_path(batch)
    places = [(pytree.keystr(path), _fields(path)) for path, _ in paths]
    if strict and isinstance(batch_axis, Mapping):
        missing = [name for name in batch_axis if not any(_names(name, fields) for _, fields in places)]
        if missing:
            there = ", ".join(".".join(fields) for _, fields in places)
            raise BatchAxisError(
                f"batch_axis names {missing[0]!r}: expected a field of the batch, which has {there}. Name fields as in "
                "'inputs' or 'inputs.mask', and positions of a tuple as in '0'."
            )
    moved, shared = [], []
    for position, ((where, fields), (_, leaf)) in enumerate(zip(places, paths, strict=True)):
        axis = _axis(batch_axis, fields, leaf)
        if isinstance(axis, str):
            axis = 0  # its elements are in their list already
        if isinstance(leaf, Tensor) and axis is not None and not -leaf.ndim <= axis < leaf.ndim:
            raise BatchAxisError(
                f"batch{where} has shape {tuple(leaf.shape)}: expected an axis {axis}, on which batch_axis says that its "
                "examples are. Correct batch_axis."
            )
        moved.append(leaf.movedim(axis, 0) if isinstance(leaf, Tensor) and axis is not None else leaf)
        if isinstance(leaf, Tensor) and axis is None:
            shared.append(position)
    counts = [len(leaf) for position, leaf in enumerate(moved) if isinstance(leaf, Tensor) and position not in shared]
    if shared and not counts:
        raise BatchAxisError(
            "batch_axis says that all tensors are shared: expected at least one with an axis of examples. Name it."
        )
    for position in shared:
        moved[position] = moved[position].expand(counts[0], *moved[position].shape)
    return pytree.tree_unflatten(moved, structure)


def from_front(batch: Any, batch_axis: BatchAxis) -> Any:
    """The inverse of :func:`to_front`, for a batch of any number of examples."""
    if batch_axis in (0, "each"):
        return batch

    def back(fields: tuple[str, ...], leaf: Any) -> Any:
        axis = _axis(batch_axis, fields, leaf)
        return leaf[0] if axis is None else leaf.movedim(0, 0 if isinstance(axis, str) else axis)

    def whole(fields: tuple[str, ...], leaf: Any) -> Any:
        if isinstance(leaf, (Element, Shared)):
            return own_copy(leaf.content)
        return back(fields, leaf) if isinstance(leaf, Tensor) else leaf

    return _map(whole, batch)


def is_shared(batch_axis: BatchAxis, path: Any, leaf: Any) -> bool:
    """Whether the user says that all examples share the part of a batch that is at this path of PyTorch's tree functions."""
    return _axis(batch_axis, _fields(path), leaf) is None


def has_lists(batch_axis: BatchAxis) -> bool:
    """Whether some part of a batch is a list with one element for each example."""
    return batch_axis == "list" or bool(_lists(batch_axis))


def fields_of(nest: Any) -> dict[str, Any]:
    """The leaves of ``nest`` by the names of their fields, as in ``"inputs"``, ``"inputs.mask"`` or ``"0"``."""
    return {".".join(_fields(path)): leaf for path, leaf in pytree.tree_leaves_with_path(nest)}


def _map(function: Callable[[tuple[str, ...], Any], Any], batch: Any) -> Any:
    paths, structure = pytree.tree_flatten_with_path(batch)
    return pytree.tree_unflatten([function(_fields(path), leaf) for path, leaf in paths], structure)


def _fields(path: Any) -> tuple[str, ...]:
    def name(key: Any) -> str:
        return str(next(getattr(key, kind) for kind in ("key", "idx", "name") if hasattr(key, kind)))

    return tuple(name(key) for key in path)


def _names(name: str, fields: tuple[str, ...]) -> bool:
    wanted = tuple(name.split("."))
    return fields[: len(wanted)] == wanted


def _lists(batch_axis: BatchAxis) -> list[str]:
    return [name for name, axis in batch_axis.items() if axis == "list"] if isinstance(batch_axis, Mapping) else []


def _shared(batch_axis: BatchAxis) -> list[str]:
    return [name for name, axis in batch_axis.items() if axis is None] if isinstance(batch_axis, Mapping) else []


def _marked_as_shared(node: Any) -> Any:
    """What is not a tensor, marked. Tensors are repeated for each example instead, as engines expect."""
    if isinstance(node, (Tensor, Shared)):
        return node
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(node)):
        return Shared(node)
    children, structure = pytree.tree_flatten(node, is_leaf=lambda inner: inner is not node)
    return pytree.tree_unflatten([_marked_as_shared(child) for child in children], structure)


def _at(node: Any, names: tuple[str, ...], change: Callable[[Any], Any]) -> Any:
    """``node`` with the part that ``names`` lead to changed; a name that is not there is left to the caller."""
    if not names:
        return change(node)
    children, structure = pytree.tree_flatten_with_path(node, is_leaf=lambda one: one is not node)
    changed = [_at(one, names[1:], change) if path and _fields(path) == names[:1] else one for path, one in children]
    return pytree.tree_unflatten(changed, structure)


def _elements(node: Any, name: str) -> Any:
    if type(node) not in (list, tuple):
        raise BatchAxisError(
            f"batch_axis says that {name or 'the batch'} is a list, but it is of type {type(node).__name__}: expected a list "
            "or tuple with one element for each example. Correct batch_axis or collate_fn."
        )
    return type(node)(Element(one) for one in node)


def _axis(batch_axis: BatchAxis, fields: tuple[str, ...], leaf: Any) -> Axis | None:
    if not isinstance(batch_axis, Mapping):
        if isinstance(batch_axis, str):
            return 0
        return batch_axis if isinstance(leaf, Tensor) and -leaf.ndim <= batch_axis < leaf.ndim else 0
    named = [name for name in batch_axis if _names(name, fields)]
    return batch_axis[max(named, key=len)] if named else 0


def _is_axis(value: object) -> bool:
    return (isinstance(value, str) and value == "list") or (isinstance(value, int) and not isinstance(value, bool))
