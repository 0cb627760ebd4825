"""Random generators that a data set, its transforms, a ``collate_fn`` or hooks hold, found and seeded for each example."""

from __future__ import annotations

import functools
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_dp.mechanism.counters import splitmix64

MOST, NEAR, LONGEST = 5000, 300, 256
"""So many objects are looked into at most, those nearest to the owners first, and containers of at most so many elements."""

GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_LEAVES = (str, bytes, int, float, complex, type(None), torch.Tensor, np.ndarray, np.generic, types.ModuleType)
_TABLES = frozenset(nn.Module().__dict__)
_HOOKS = tuple(sorted(name for name in _TABLES if name.endswith("_hooks")))
_CLOSED = frozenset({
    "lightning", "pytorch_lightning", "lightning_fabric", "lightning_dp", "pytest", "_pytest", "pluggy", "hypothesis",
    "wandb", "mlflow",
})  # fmt: skip
"""Packages whose own objects, such as a Trainer or a run that is logged, hold nothing that user code draws from. There are
thousands of these, and each micro-batch would be looked for in all of them."""
_LIBRARIES = _CLOSED | sys.stdlib_module_names | {
    "torch", "torchvision", "torchmetrics", "numpy", "transformers", "scipy", "pandas", "datasets", "pyarrow", "PIL",
}  # fmt: skip
"""Packages whose functions and classes draw from global generators, or from those that their objects hold."""


def own_generators(*owners: Any, most: int = MOST) -> list[Any]:
    """The generators reachable from these: in attributes, small containers, closures, classes, and globals that code names.

    Args:
        owners: where to begin.
        most: so many objects are looked into.
    """
    return generators_in(reachable(*owners, most=most))


def reachable(*owners: Any, most: int = MOST) -> list[Any]:
    """Generators, containers, objects, classes and functions reachable from these; nothing that is only a value."""
    seen: dict[int, Any] = {}
    todo = deque(owners)
    while todo and len(seen) < most:
        one = todo.popleft()
        if isinstance(one, _LEAVES) or id(one) in seen:
            continue
        seen[id(one)] = one  # kept, so that its number stays its own
        if not isinstance(one, GENERATORS):
            todo += _held(one)
    return list(seen.values())


def generators_in(found: Sequence[Any]) -> list[Any]:
    """The generators among these."""
    return [one for one in found if isinstance(one, GENERATORS) and not isinstance(one, random.SystemRandom)]


def reseed(generators: Sequence[Any], seed: int) -> None:
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


@contextmanager
def put_back(generators: Sequence[Any]) -> Iterator[None]:
    """Leave these generators as they were found."""
    before = [_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, before, strict=True):
            _set_state(generator, state)


@contextmanager
def seeded_as_torch_is(*owners: Any) -> Iterator[None]:
    """Their own generators draw what follows from torch's seed, so that a look can repeat it, and are put back afterwards."""
    generators = own_generators(*owners)
    with put_back(generators):
        reseed(generators, torch.initial_seed() & _ALL_BITS)
        yield


_ALL_BITS = 2**64 - 1


def _state(generator: Any) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return generator.getstate() if isinstance(generator, random.Random) else generator.get_state()


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.set_state(state)


def _held(one: Any) -> list[Any]:
    if isinstance(one, (list, tuple, set, frozenset, deque)):
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
    if _root(type(one).__module__) in _CLOSED:
        return []
    attributes = _attribute(one, "__dict__")
    held = attributes if isinstance(attributes, dict) else {}
    if isinstance(one, nn.Module):
        hooks = [table for name in _HOOKS if (table := held.get(name))]
        inner = [*one._modules.values(), *hooks]
        if type(one).__module__.startswith("torch.nn."):
            return inner
        return [*inner, *(value for name, value in held.items() if name not in _TABLES), type(one)]
    slots = [name for kind in type(one).__mro__ for name in _slots(kind)]
    return [*held.values(), *(_attribute(one, name) for name in slots), type(one)]


def _attribute(one: Any, name: str) -> Any:
    try:
        return getattr(one, name, None)
    except Exception:  # an attribute that somebody's code computes
        return None


def _slots(kind: type) -> list[str]:
    named = kind.__dict__.get("__slots__", ())
    return [named] if isinstance(named, str) else list(named)


def _of_class(kind: type) -> list[Any]:
    """What a class of the user's holds, and its functions; none of a library's, which are many."""
    if _root(kind.__module__) in _LIBRARIES:
        return []
    parts: list[Any] = []
    for part in vars(kind).values():
        if isinstance(part, property):
            parts += (part.fget, part.fset)
        else:
            parts.append(part.__func__ if isinstance(part, (classmethod, staticmethod)) else part)
    return [*parts, *kind.__bases__]


def _of_function(function: types.FunctionType) -> list[Any]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    if _root(function.__module__) in _LIBRARIES:
        return cells
    names = _names(function.__code__)
    more = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), function.__dict__)
    return [*cells, *more, *_named(names, function.__globals__, frozenset())]


def _named(names: frozenset[str], scope: dict[str, Any], within: frozenset[int]) -> list[Any]:
    """What code means by these names: globals, and parts of the modules among them, as in ``transforms.GENERATOR``."""
    found = []
    for name in sorted(names & scope.keys()):
        value = scope[name]
        if not isinstance(value, types.ModuleType):
            found.append(value)
        elif id(value) not in within and _root(value.__name__) not in _LIBRARIES:
            found += _named(names, vars(value), within | {id(value)})
    return found


@functools.lru_cache(maxsize=4096)  # asked for every micro-batch
def _names(code: types.CodeType) -> frozenset[str]:
    """The names that code uses, and the code within it."""
    inner = [_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(code.co_names).union(*inner)


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (an empty cell raises)
    except ValueError:
        return False
    return True


def _root(module: object) -> str:
    return str(module).split(".")[0]
