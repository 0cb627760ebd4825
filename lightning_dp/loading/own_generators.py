"""Random generators that a data set, its transforms or a ``collate_fn`` hold, found and seeded for each example."""

from __future__ import annotations

import functools
import random
import types
from typing import Any

import numpy as np
import torch

from lightning_dp.mechanism.counters import splitmix64

MOST, LONGEST = 2000, 64
"""So many objects are looked into at most, and containers of at most so many elements."""

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, np.generic, types.ModuleType)


def own_generators(*owners: Any) -> list[Any]:
    """The generators reachable from these: in attributes, small containers, closures, and globals that functions name."""
    found: list[Any] = []
    seen: set[int] = set()
    todo = list(owners)
    while todo and len(seen) < MOST:
        one = todo.pop()
        if isinstance(one, _LEAVES) or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, GENERATORS):
            if not isinstance(one, random.SystemRandom):
                found.append(one)
        else:
            todo += _held(one)
    return found[::-1]


def reseed(generators: list[Any], seed: int) -> None:
    """Seed each of these generators for an example: a function of ``seed`` and the generator's place alone."""
    counters = np.arange(1, len(generators) + 1, dtype=np.uint64)
    for generator, own in zip(generators, splitmix64(seed, counters).tolist(), strict=True):
        if isinstance(generator, torch.Generator):
            generator.manual_seed(own >> 1)
        elif isinstance(generator, np.random.Generator):
            bits: Any = generator.bit_generator
            bits.state = type(bits)(own).state
        elif isinstance(generator, np.random.RandomState):
            generator.seed(own >> 32)
        else:
            generator.seed(own)


def _held(one: Any) -> list[Any]:
    if isinstance(one, (list, tuple, set, frozenset)):
        return list(one) if len(one) <= LONGEST else []
    if isinstance(one, dict):
        return list(one.values()) if len(one) <= LONGEST else []
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, types.FunctionType):
        return _of_function(one)
    if isinstance(one, type):
        return _of_class(one)
    attributes = getattr(one, "__dict__", None)
    held = list(attributes.values()) if isinstance(attributes, dict) else []
    slots = [name for kind in type(one).__mro__ for name in _slots(kind)]
    return [*held, *(getattr(one, name, None) for name in slots), type(one)]


def _slots(kind: type) -> list[str]:
    named = kind.__dict__.get("__slots__", ())
    return [named] if isinstance(named, str) else list(named)


def _of_class(kind: type) -> list[Any]:
    """What a class of the user's holds, and its functions; none of a library's, which are many."""
    if _is_library(kind.__module__):
        return []
    found = [part for name, part in vars(kind).items() if not name.startswith("__") or name in _CALLED]
    return [*(getattr(part, "__func__", part) for part in found), *kind.__bases__]


_CALLED = ("__getitem__", "__getitems__", "__call__")


def _of_function(function: types.FunctionType) -> list[Any]:
    if _is_library(function.__module__):
        return []
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    named = [function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__]
    return [*cells, *named, *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def _is_library(module: str | None) -> bool:
    return str(module).split(".")[0] in _LIBRARIES


_LIBRARIES = frozenset(
    {"builtins", "torch", "torchvision", "numpy", "lightning", "pytorch_lightning", "lightning_dp", "transformers", "abc",
     "typing", "collections", "functools", "random", "PIL", "scipy", "pandas", "datasets"}
)  # fmt: skip
