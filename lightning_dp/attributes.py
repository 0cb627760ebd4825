"""Python attributes of a module, and putting them back as they were."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

TORCH_KEEPS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
"""Entries of a module's ``__dict__`` that are torch's: parameters and buffers are watched elsewhere."""

_CONTAINERS = (list, dict, set, deque)


@contextmanager
def attributes_put_back(module: nn.Module) -> Iterator[None]:
    """Undo, when it closes, every attribute that was set, changed or deleted on ``module`` or a module inside it.

    Lists, dicts, sets and deques get their items back; what is deeper inside is not looked at.
    """
    before = [(one, snapshot(one)) for one in module.modules()]
    try:
        yield
    finally:
        for one, found in before:
            put_back(one, found)


def snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of one module: name → the object, and its items if it is a container."""
    return {
        name: (value, value.copy() if type(value) in _CONTAINERS else None)
        for name, value in module.__dict__.items()
        if name not in TORCH_KEEPS
    }


def put_back(module: nn.Module, found: dict[str, tuple[Any, Any]]) -> None:
    """Make the attributes of one module what they were when ``found`` was taken."""
    now = module.__dict__
    for name in [name for name in now if name not in found and name not in TORCH_KEEPS]:
        del now[name]
    for name, (value, items) in found.items():
        if items is not None and (len(items) != len(value) or not _same(items, value)):
            value.clear()
            value.update(items) if isinstance(value, (dict, set)) else value.extend(items)
        if now.get(name, TORCH_KEEPS) is not value:
            now[name] = value


def _same(items: Any, value: Any) -> bool:
    """Whether two containers of one length hold the very same objects."""
    if isinstance(value, dict):
        return all(value.get(key, TORCH_KEEPS) is item for key, item in items.items())
    if isinstance(value, set):
        return bool(items == value)
    return all(a is b for a, b in zip(items, value, strict=True))
