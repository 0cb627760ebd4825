"""Which names code reads that runs for an example: a data set's, its transforms' and collate_fn's."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from lightning_dp.engines.user_code import is_file_of_the_users

_UNREAD = ("__init__", "__repr__", "__del__", "__getstate__", "__setstate__", "__len__")
"""Methods that do not run for an example."""


def names_read(found: list[Any]) -> frozenset[str]:
    """Every name that code reads which may run for an example: one that is written only, or added to, is none of them.

    Args:
        found: of :func:`lightning_dp.loading.own_generators.reachable`.
    """
    kinds = tuple(one for one in found if isinstance(one, type) and is_users_class(one))
    return _names_read(tuple(_entries(found, kinds)), kinds)


def is_users_class(kind: type) -> bool:
    """Whether a class is of no installed package."""
    return is_file_of_the_users(_file_of(kind))


@lru_cache(maxsize=16)
def _names_read(entries: tuple[types.CodeType, ...], kinds: tuple[type, ...]) -> frozenset[str]:
    found: set[str] = set()
    done: set[types.CodeType] = set()
    todo = list(entries)
    while todo:
        code = todo.pop()
        if code in done:
            continue
        done.add(code)
        names = set(_loaded(code))
        todo += [one for one in code.co_consts if isinstance(one, types.CodeType)]
        for kind in kinds:
            for name in (names & vars(kind).keys()) - set(_UNREAD):
                todo += [function.__code__ for function in _functions(vars(kind)[name])]
        found |= names
    return frozenset(found)


def _loaded(code: types.CodeType) -> Iterable[str]:
    before = ""
    for step in dis.get_instructions(code):
        adds_to = step.opname == "LOAD_ATTR" and before == "COPY"  # self.count += 1
        if step.opname.startswith("LOAD") and isinstance(step.argval, str) and not adds_to:
            yield step.argval
        before = step.opname


def _entries(found: list[Any], kinds: tuple[type, ...]) -> Iterable[types.CodeType]:
    """Where code that runs for an example may begin: functions that are no methods, and what Python calls by itself."""
    methods = {function for kind in kinds for value in vars(kind).values() for function in _functions(value)}
    for one in found:
        if isinstance(one, types.FunctionType):
            if one not in methods and is_file_of_the_users(one.__code__.co_filename):
                yield one.__code__
        elif not isinstance(one, type) and is_users_class(type(one)):
            for kind in type(one).__mro__:
                for name in ("__getitem__", "__getitems__", "__call__", "forward"):
                    yield from (function.__code__ for function in _functions(vars(kind).get(name)))


def _functions(value: Any) -> list[types.FunctionType]:
    parts = [value.fget, value.fset] if isinstance(value, property) else [getattr(value, "__func__", value)]
    return [part for part in parts if isinstance(part, types.FunctionType)]


@lru_cache(maxsize=1024)
def _file_of(kind: type) -> str:
    module = sys.modules.get(kind.__module__)
    return getattr(module, "__file__", None) or ("<main>" if kind.__module__ == "__main__" else "")
