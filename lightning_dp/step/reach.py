"""What a training step can read of Python: every container, object, tensor, array and generator within reach of its module."""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import Metric

from lightning_dp.engines.user_code import is_file_of_the_users
from lightning_dp.lightning_internals import KEPT_BY_LIGHTNING, either
from lightning_dp.mechanism.instead import Instead
from lightning_dp.step.places import (
    CellPlace,
    ClassPlace,
    DictPlace,
    GeneratorPlace,
    ListPlace,
    NamesPlace,
    OpaquePlace,
    Place,
    SetPlace,
    SlotsPlace,
)

MOST = 50_000
"""So many containers and objects are followed. Whatever holds more of them is data rather than state."""

_ATOMS = (int, float, complex, str, bytes, range, slice, type(None), type(...), np.generic, torch.dtype, torch.device)
_OPEN = (types.SimpleNamespace, argparse.Namespace, random.Random)
_FOREIGN = {"torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "numpy", "lightning_dp"}
"""Packages whose objects keep their own books: what they hold is followed only if it is a module or a container."""

_TORCH_TABLES = frozenset(nn.Module().__dict__) - {"training"}


class Reach:
    """Walks from a module, and from further roots, to everything that can be read from there.

    Not followed are data sets, loaders and samplers (a step may not read those), metrics (see
    :mod:`lightning_dp.step.metrics`), the Trainer and what belongs to it, and the insides of objects of torch and Lightning.

    Args:
        hidden: for a module, the names of attributes that passes do not see.

    Attributes:
        places: everything that holds something else, with what it held when it was reached.
        tensors: by name; parameters and buffers by their own.
        arrays: NumPy arrays by name.
        in_shards: whether parameters are kept in shards (FSDP2), so that other tensors are there at other times.
        libraries: what the names of things begin with that belong to objects of installed libraries, which keep caches.
    """

    def __init__(self, hidden: Callable[[nn.Module], Collection[str]] = lambda module: ()) -> None:
        self.places: list[Place] = []
        self.tensors: dict[str, Tensor] = {}
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.libraries: list[str] = []
        self.in_shards = self._has_metrics_of_parts = False
        self._hidden = hidden
        self._seen: dict[int, Any] = {}
        self._stops = _stops()

    def leave_out(self, things: Iterable[Any]) -> None:
        """Do not follow these."""
        self._seen.update({id(thing): thing for thing in things})

    @property
    def can_be_renewed(self) -> bool:
        """Whether each thing that was reached hangs on a place. Parameters in shards come and go, and metrics are none."""
        return not self.in_shards and not self._has_metrics_of_parts and len(self._seen) < MOST

    def renew(self) -> bool:
        """Hold all places to what they hold now, if nothing has come or gone that would be followed: numbers and texts.

        Returns:
            Whether that is so. If not, nothing is changed, and it has to be walked anew.
        """
        differing = [place for place in self.places if place.differs()]
        for place in differing:
            if not isinstance(place, DictPlace):
                return False
            if not all(isinstance(value, (*_ATOMS, Instead)) for value in place.changed()):
                return False
        for place in differing:
            place.take()  # type: ignore[attr-defined]  # all are
        return True

    def walk(self, name: str, root: Any) -> None:
        """Follow ``root``, and call what is reached by names that begin with ``name``."""
        pending: deque[tuple[str, Any]] = deque([(name, root)])
        while pending and len(self._seen) < MOST:
            where, thing = pending.popleft()
            if isinstance(thing, _ATOMS) or id(thing) in self._seen:
                continue
            self._seen[id(thing)] = thing
            pending.extend(self._inside(where, thing))

    def _inside(self, where: str, thing: Any) -> Iterator[tuple[str, Any]]:
        """Note one thing, and give what it holds."""
        kind = type(thing)
        if isinstance(thing, Tensor):
            if not is_lazy(thing) and not thing.is_meta:
                self.tensors[where] = thing
            return
        if isinstance(thing, np.ndarray):
            self.arrays[where] = thing
            return
        if isinstance(thing, Metric):  # its states are hidden otherwise; what it trains is weights
            tables = [*thing._parameters.items(), *thing._modules.items()]
            self._has_metrics_of_parts = self._has_metrics_of_parts or bool(tables)
            yield from ((f"{where}.{name}" if where else name, one) for name, one in tables)
        if isinstance(thing, (*self._stops, Instead)):
            return
        if isinstance(thing, nn.Module):
            yield from self._inside_module(where, thing)
            return
        if GeneratorPlace.takes(thing):
            self.places.append(GeneratorPlace(where, thing))
            return
        if isinstance(thing, type):
            if is_users_class(thing):
                yield from self._inside_class(where, thing)
            return
        if isinstance(thing, types.FunctionType):
            yield from self._inside_function(where, thing)
            return
        if isinstance(thing, types.MethodType):
            yield where, thing.__self__
            yield f"{where}.__func__", thing.__func__
            return
        if isinstance(thing, functools.partial):
            yield from ((where, part) for part in (thing.func, thing.args, thing.keywords))
            return
        if isinstance(thing, (dict, list, tuple, set, frozenset, deque)):
            yield from self._inside_container(where, thing)
        elif isinstance(thing, (itertools.count, types.GeneratorType)):
            self.places.append(OpaquePlace(where, thing))
            return
        if not isinstance(thing, _OPEN) and kind.__module__.split(".")[0] in _FOREIGN | sys.stdlib_module_names:
            return
        yield from self._inside_object(where, thing)

    def _inside_module(self, where: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
        kept = module.__dict__
        prefix = f"{where}." if where else ""
        lightnings = KEPT_BY_LIGHTNING if isinstance(module, either(pl.LightningModule)) else frozenset()
        ignored = {*lightnings, *_TORCH_TABLES, *self._hidden(module)}
        self._note_library(where, module)
        in_shards = isinstance(module, FSDPModule) or any(
            hasattr(one, "to_local") for one in kept["_parameters"].values()
        )
        self.in_shards = self.in_shards or in_shards
        for name in ("_parameters", "_buffers", "_modules"):
            table = kept[name]
            if name == "_parameters" and self.in_shards:  # FSDP2 puts whole ones in their places, and shards again
                yield from ((f"{prefix}{key}", value) for key, value in table.items())
                continue
            self.places.append(DictPlace(f"{prefix}{name}", table, named=prefix))
            yield from ((f"{prefix}{key}", value) for key, value in table.items())
        for name in _TORCH_TABLES - {"_parameters", "_buffers", "_modules"}:
            if isinstance(kept.get(name), dict) and kept[name]:
                yield f"{prefix}{name}", kept[name]
        always = lightnings | _TORCH_TABLES

        def beside() -> Collection[str]:
            hidden = self._hidden(module)
            return always | set(hidden) if hidden else always

        self.places.append(DictPlace(where or "self", kept, beside, named=prefix))
        yield from ((f"{prefix}{key}", value) for key, value in kept.items() if key not in ignored)
        yield f"{type(module).__name__}", type(module)

    def _note_library(self, where: str, thing: Any) -> None:
        kind = type(thing)
        if (
            where
            and kind.__module__.split(".")[0] not in _FOREIGN | sys.stdlib_module_names
            and not is_users_class(kind)
        ):
            self.libraries.append(where)

    def _inside_container(self, where: str, thing: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(thing, dict):
            self.places.append(DictPlace(where, thing))
            yield from ((f"{where}[{key!r}]", value) for key, value in thing.items() if not isinstance(value, _ATOMS))
            return
        if isinstance(thing, (list, deque)):
            self.places.append(ListPlace(where, thing))
        elif isinstance(thing, set):
            self.places.append(SetPlace(where, thing))
        yield from ((f"{where}[{index}]", item) for index, item in enumerate(thing) if not isinstance(item, _ATOMS))

    def _inside_object(self, where: str, thing: Any) -> Iterator[tuple[str, Any]]:
        self._note_library(where, thing)
        kept = getattr(thing, "__dict__", None)
        if isinstance(kept, dict):
            self.places.append(DictPlace(where, kept))
            yield from ((f"{where}.{key}", value) for key, value in kept.items())
        slots = SlotsPlace.names(thing)
        if slots:
            self.places.append(SlotsPlace(where, thing, slots))
            yield from ((f"{where}.{name}", getattr(thing, name)) for name in slots if hasattr(thing, name))
        yield f"{type(thing).__name__}", type(thing)

    def _inside_class(self, where: str, kind: type) -> Iterator[tuple[str, Any]]:
        """What a class of the user's keeps in its body, and what its methods name."""
        self.places.append(ClassPlace(where, kind))
        for name, value in list(vars(kind).items()):
            if name.startswith("__") and not isinstance(value, types.FunctionType):
                continue
            for function in functions_of(value):
                yield f"{where}.{name}", function
            if not callable(value) and not isinstance(value, (property, classmethod, staticmethod)):
                yield f"{where}.{name}", value
        yield from ((base.__name__, base) for base in kind.__bases__)

    def _inside_function(self, where: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
        """What a function of the user's holds, and the global names that it uses."""
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            self.places.append(CellPlace(f"{name} of {function.__qualname__}", cell))
            try:
                yield f"{name} of {function.__qualname__}", cell.cell_contents
            except ValueError:  # nothing is in it yet
                continue
        if not is_file_of_the_users(function.__code__.co_filename):
            return
        yield f"a default of {function.__qualname__}", function.__defaults__
        yield f"a default of {function.__qualname__}", function.__kwdefaults__
        if function.__dict__:
            self.places.append(DictPlace(function.__qualname__, function.__dict__))
            yield from ((f"{function.__qualname__}.{key}", value) for key, value in function.__dict__.items())
        named = set(names_in(function.__code__))
        yield from self._inside_names(function.__module__ or "", function.__globals__, named)

    def _inside_names(self, module: str, names: dict[str, Any], named: set[str]) -> Iterator[tuple[str, Any]]:
        here = {name for name in named if name in names and not name.startswith("__")}
        self.places.append(NamesPlace(f"module {module}", names, here))
        for name in here:
            value = names[name]
            if isinstance(value, types.ModuleType):
                file = getattr(value, "__file__", None) or ""
                if id(value) not in self._seen and is_file_of_the_users(file):
                    self._seen[id(value)] = value
                    yield from self._inside_names(value.__name__, vars(value), set(vars(value)) - here)
            else:
                yield f"{module}.{name}", value


def _stops() -> tuple[type, ...]:
    """What is not followed."""
    kinds: list[type] = [Dataset, DataLoader, Sampler, Metric, torch.optim.Optimizer, types.ModuleType]
    for kind in (pl.Trainer, pl.LightningDataModule, pl.Callback, pl.loggers.Logger, pl.strategies.Strategy):
        kinds += either(kind)
    return tuple(kinds)


def functions_of(value: Any) -> list[types.FunctionType]:
    """The functions behind an entry of a class body."""
    parts: list[Any] = [value]
    if isinstance(value, property):
        parts = [value.fget, value.fset]
    elif isinstance(value, (classmethod, staticmethod)):
        parts = [value.__func__]
    return [part for part in parts if isinstance(part, types.FunctionType)]


def names_in(code: types.CodeType) -> Iterator[str]:
    """The names that code uses, and the code within it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, str) and constant.isidentifier():
            yield constant  # as in getattr(self, "center")
        if isinstance(constant, types.CodeType):
            yield from names_in(constant)


def is_users_class(kind: type) -> bool:
    """Whether a class is of no installed package; one of a notebook is its user's."""
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None) or ("<main>" if kind.__module__ == "__main__" else "")
    return is_file_of_the_users(file)
