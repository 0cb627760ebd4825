"""What a hook between two passes can change that a later step reads, or that steers it: compared, and put back."""

from __future__ import annotations

import dis
import re
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_dp.engines.user_code import is_file_of_the_users
from lightning_dp.mechanism.same import snapshot
from lightning_dp.step.contents import Contents
from lightning_dp.step.kept_state import hidden_on, reach_of
from lightning_dp.step.places import DictPlace, Place
from lightning_dp.step.reach import functions_of, is_users_class, names_in
from lightning_dp.step.trainer_state import optimizer_tensors, trainer_reach


class Reached:
    """Everything within reach of a module and of its Trainer, as it is now.

    Args:
        module: the user's, attached to its Trainer.
    """

    def __init__(self, module: pl.LightningModule) -> None:
        self._module, self._module_reach, self._beside = module, reach_of(module), trainer_reach(module)
        self._hidden = self._hidden_now()
        self.places = [*self._module_reach.places, *self._beside.places]
        self.tensors = {**self._module_reach.tensors, **self._beside.tensors}
        self.arrays = {**self._module_reach.arrays, **self._beside.arrays}

    def _hidden_now(self) -> list[tuple[str, ...]]:
        return [tuple(hidden_on(one)) for one in self._module.modules()]

    def renew(self) -> bool:
        """Hold it to what is there now, which takes a tenth of the time of a walk.

        Returns:
            Whether that can be done: nothing has come or gone since but numbers and texts. If not, it must be used no more.
        """
        kept = self._module_reach.can_be_renewed and self._beside.can_be_renewed and self._hidden == self._hidden_now()
        return kept and self._module_reach.renew() and self._beside.renew()


class HookState:
    """All that a step can read, what steers it, and the gradients, before a hook.

    Args:
        module: the user's, attached to its Trainer.
        public: names of what may change all the same.
        reached: everything within reach, as it is now, held by nobody else.
    """

    def __init__(
        self, module: pl.LightningModule, public: tuple[str, ...] = (), reached: Reached | None = None
    ) -> None:
        self._module, self._reach = module, Reached(module) if reached is None else reached
        self._public = public
        tensors = self._tensors()
        self._contents = Contents.of(tensors, self._reach.arrays)
        copies = self._contents.copies
        self._kept = {name: copies[name] if name in copies else one.detach().clone() for name, one in tensors.items()}
        self._attributes = [(one, dict(one.__dict__)) for one in module.modules()]
        self._gradients = [(p, p.grad) for p in module.parameters()]

    @property
    def reached(self) -> Reached:
        """What it is compared by, for the next one, once this one is no longer needed."""
        return self._reach

    def _tensors(self) -> dict[str, Tensor]:
        found = {**self._reach.tensors, **optimizer_tensors(self._module.trainer)}
        for name, parameter in self._module.named_parameters():
            if parameter.grad is not None:
                found[f"{name}.grad"] = parameter.grad
        return {name: tensor for name, tensor in found.items() if not hasattr(tensor, "to_local")}

    def _counts(self, where: str) -> bool:
        return not any(where == name or where.startswith((f"{name}.", f"{name}[")) for name in self._public)

    def changed(self) -> tuple[list[Place], list[str]]:
        """The places and the names of tensors and arrays that hold something else now."""
        places = [place for place in self._reach.places if self._counts(place.where) and place.differs()]
        places = [place for place in places if self._of(place)]
        return places, [name for name in self._contents.changed() if self._counts(name)]

    def _of(self, place: Place) -> dict[str, Any]:
        """What a place holds that has changed, by name, apart from what is declared public."""
        if not isinstance(place, DictPlace) or place.named is None:
            return {place.where: place.held()}
        moved = {f"{place.named}{key}": value for key, value in place.moved().items()}
        return {name: value for name, value in moved.items() if self._counts(name)}

    def now(self, places: list[Place], names: list[str]) -> dict[str, Any]:
        """What these hold now."""
        found = {name: snapshot(value) for place in places for name, value in self._of(place).items()}
        for name in names:
            value = self._contents.tensors.get(name)
            found[name] = self._contents.arrays[name].copy() if value is None else value.detach().clone()
        return found

    def put_back(self, places: list[Place], names: list[str]) -> None:
        """Make these hold what they held."""
        for place in places:
            place.put_back()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for name in names:
                if name in self._kept:
                    self._contents.tensors[name].detach().copy_(self._kept[name])
                else:
                    self._contents.arrays[name][...] = self._contents.copied[name]

    def put_back_all(self) -> None:
        """Make everything hold what it held, hidden or not."""
        for owner, kept in self._attributes:
            owner.__dict__.update(kept)
        self.put_back(*self.changed())


def attribute_of(module: nn.Module, where: str) -> tuple[nn.Module, str] | None:
    """The module and the Python attribute of it that a name begins with; ``None`` if it is a tensor of its own, or no one's."""
    owner, rest = module, where
    while " " not in where:
        name = re.split(r"[.\[]", rest, maxsplit=1)[0]
        inner = owner._modules.get(name)
        if inner is not None and rest != name:
            owner, rest = inner, rest[len(name) + 1 :]
            continue
        own = name in owner._parameters or name in owner._buffers or name in owner._modules
        return None if own or name in vars(nn.Module()) else (owner, name)
    return None


def names_read_by_steps(module: nn.Module) -> set[str]:
    """Every name that code of the module may read while a step runs: of all methods but hooks between steps."""
    found: set[str] = set()
    for kind in {base for one in module.modules() for base in type(one).__mro__ if is_users_class(base)}:
        for name, value in vars(kind).items():
            if name not in _BESIDE and not name.startswith(_BETWEEN):
                for function in functions_of(value):
                    found |= set(names_in(function.__code__))
    return found


def names_used(function: Any, owner: Any) -> set[str]:
    """Every name that a method may read, by itself or in other methods of its owner and functions of the user's."""
    found: set[str] = set()
    todo = [getattr(function, "__func__", function)]
    done: set[int] = set()
    while todo:
        one = todo.pop()
        code = getattr(one, "__code__", None)
        if code is None or id(one) in done:
            continue
        done.add(id(one))
        names = set(names_in(code))
        found |= names
        called = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
        values = [one.__globals__.get(name) for name in called] + [getattr(type(owner), name, None) for name in names]
        parts = [part for value in values for part in functions_of(value)]
        todo += [part for part in parts if is_file_of_the_users(part.__code__.co_filename)]
    return found


_BESIDE = {"__init__", "state_dict", "load_state_dict", "setup", "teardown", "prepare_data"}
_BETWEEN = ("on_", "configure_", "validation_", "test_", "predict_")
