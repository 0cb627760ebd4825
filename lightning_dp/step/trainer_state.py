"""What steers training: the Trainer, its loops, optimizers and schedulers, as places that can be compared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from operator import is_
from types import CellType
from typing import Any

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_dp.lightning_internals import SAVES
from lightning_dp.step.places import DictPlace, ListPlace, Place, under
from lightning_dp.step.reach import Reach


def trainer_reach(module: pl.LightningModule) -> Reach:
    """Everything by which rate, length and course of training are set, and what somebody keeps on the Trainer.

    Followed are the attributes of the Trainer, its strategy, data module and loops, the loops' counters, optimizers with their
    groups, state and hooks, and learning rate schedulers; of callbacks, which there are and what stands in place of their
    methods. What these refer to otherwise (the module, loggers, data) is not.

    Args:
        module: attached to its Trainer.
    """
    trainer: Any = module.trainer
    reach = Reach()
    reach.leave_out([trainer, *module.modules(), *module.parameters(), *module.buffers()])
    _attributes(reach, "the Trainer's ", trainer, besides=("callbacks",))
    _attributes(reach, "the strategy's ", trainer.strategy, saves=SAVES)
    for what, several in (("callbacks", trainer.callbacks), ("optimizers", trainer.optimizers)):
        if isinstance(several, list):
            reach.places.append(_Several(f"the Trainer's {what}", several))
    for callback in trainer.callbacks:
        reach.places.append(_Methods(f"a method of {type(callback).__name__}", callback))
    reach.places.append(_Methods("a method of the strategy", trainer.strategy))
    data = getattr(trainer, "datamodule", None)
    if data is not None:
        _attributes(reach, "the data module's ", data)
    for name, loop in _loops(trainer):
        _attributes(reach, f"the {name}'s ", loop)
    for number, optimizer in enumerate(trainer.optimizers):
        _attributes(reach, f"optimizer {number}, ", optimizer, besides=("param_groups", "state"))
        reach.places.append(_Methods(f"a method of optimizer {number}", optimizer))
        reach.walk(f"optimizer {number}, param_groups", optimizer.param_groups)
        for name, value in list(vars(optimizer).items()):
            if name.endswith("_hooks"):
                reach.walk(f"optimizer {number}, {name}", value)
        reach.places.append(_OptimizerState(f"optimizer {number}, state", optimizer))
    for number, config in enumerate(trainer.strategy.lr_scheduler_configs):
        _attributes(reach, f"scheduler {number}, ", config.scheduler)
    return reach


def optimizer_tensors(trainer: Any) -> dict[str, Tensor]:
    """The tensors that optimizers keep, by name."""
    return {
        f"optimizer {number}, state {place}": tensor
        for number, optimizer in enumerate(trainer.optimizers)
        for place, tensor in enumerate(_tensors(optimizer))
    }


def _attributes(
    reach: Reach, named: str, owner: Any, besides: tuple[str, ...] = (), saves: tuple[str, ...] = ()
) -> None:
    """Note the attributes of an object, but for those with which it ``saves``, and follow them, but for those ``besides``."""
    kept = vars(owner)
    reach.places.append(DictPlace(named, kept, _beside(kept, saves), named=named))
    for name, value in list(kept.items()):
        if name not in besides and not name.startswith("_"):
            reach.walk(f"{named}{name}", value)


def _beside(kept: dict[str, Any], saves: tuple[str, ...]) -> Callable[[], set[str]]:
    """Methods that something stands in place of: they come and go."""
    return lambda: {*saves, *(name for name, value in kept.items() if callable(value))}


def _loops(trainer: Any) -> Iterator[tuple[str, Any]]:
    fit, epoch = trainer.fit_loop, trainer.fit_loop.epoch_loop
    yield "fit loop", fit
    yield "epoch loop", epoch
    yield "optimizer loop", epoch.automatic_optimization
    yield "manual loop", epoch.manual_optimization
    for name, loop in (("fit loop", fit), ("epoch loop", epoch), ("optimizer loop", epoch.automatic_optimization)):
        for key, value in vars(loop).items():
            yield from _counters(f"{name}'s {key}", value)


def _counters(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The counters of a loop, which are dataclasses in dataclasses."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield name, value
        for key, inner in vars(value).items():
            yield from _counters(f"{name}.{key}", inner)


def _tensors(optimizer: Optimizer) -> list[Tensor]:
    kept = [one for one in optimizer.state.values() if isinstance(one, dict)]
    return [value for one in kept for value in one.values() if isinstance(value, Tensor)]


class _Several(ListPlace):
    """A list of objects, of which two hooks that put in objects alike are alike."""

    @override
    def held(self) -> Any:
        return [type(one).__qualname__ for one in self._live]


def _what_it_knows(function: Any) -> Any:
    """A function's name and what its closure holds, to be compared."""
    plain = getattr(function, "__func__", function)
    cells = [cell for cell in getattr(plain, "__closure__", None) or () if cell != CellType()]  # without empty ones
    return getattr(plain, "__qualname__", type(plain).__qualname__), [cell.cell_contents for cell in cells]


class _Methods(Place):
    """The functions that stand in an object's ``__dict__``, such as those in the place of its methods."""

    def __init__(self, where: str, live: Any) -> None:
        self.where, self._live = where, live
        self._kept = self._functions()
        self._whole = self._as_it_is()

    def _as_it_is(self) -> tuple[tuple[str, ...], tuple[bool, ...], tuple[Any, ...]]:
        """All names, under which of them there are functions, and these: found out without a call of Python for each."""
        held = vars(self._live)
        return tuple(held), tuple(map(callable, held.values())), tuple(filter(callable, held.values()))

    def _functions(self) -> dict[str, Any]:
        found = {name: under(value) for name, value in vars(self._live).items() if callable(value)}
        return {name: value for name, value in found.items() if value is not None}

    @override
    def differs(self) -> bool:
        names, which, functions = self._as_it_is()
        if names == self._whole[0] and which == self._whole[1] and all(map(is_, functions, self._whole[2])):
            return False
        now = self._functions()
        return now.keys() != self._kept.keys() or any(now[name] is not value for name, value in self._kept.items())

    @override
    def held(self) -> Any:
        return {name: _what_it_knows(value) for name, value in self._functions().items()}

    @override
    def put_back(self) -> None:
        now = self._functions()
        for name in now.keys() - self._kept.keys():
            del vars(self._live)[name]
        for name, value in self._kept.items():
            if now.get(name) is not value:
                vars(self._live)[name] = value


class _OptimizerState(Place):
    """Which numbers and tensors an optimizer keeps for its parameters."""

    def __init__(self, where: str, live: Optimizer) -> None:
        self.where, self._live, self._state = where, live, live.state
        self._kept = {key: dict(one) if isinstance(one, dict) else one for key, one in live.state.items()}

    @override
    def differs(self) -> bool:
        now = self._live.state
        if now is not self._state or len(now) != len(self._kept):
            return True
        for key, kept in self._kept.items():
            there = now.get(key)
            if isinstance(kept, dict) and isinstance(there, dict):
                if len(there) != len(kept) or any(there.get(name) is not value for name, value in kept.items()):
                    return True
            elif there is not kept:
                return True
        return False

    @override
    def held(self) -> Any:
        return [dict(one) if isinstance(one, dict) else one for one in self._live.state.values()]

    @override
    def put_back(self) -> None:
        self._live.state = self._state
        self._state.clear()
        self._state.update({key: dict(one) if isinstance(one, dict) else one for key, one in self._kept.items()})
