"""Hooks of the user's own between two passes: what they do to the state that a step can read follows from nobody's data."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_dp.engines.user_code import Line
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import overridden
from lightning_dp.loading.placeholder import emptied_object, without_content
from lightning_dp.mechanism.instead import Instead
from lightning_dp.step.attributes import hide, left_hidden
from lightning_dp.step.callback_state import CallbackState
from lightning_dp.step.contents import Contents
from lightning_dp.step.kept_state import name_of, reach_of
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.metrics import outermost_metrics, states_hidden
from lightning_dp.step.places import DictPlace, Place
from lightning_dp.step.reach import functions_of, is_users_class, names_in
from lightning_dp.step.same import same, snapshot
from lightning_dp.step.withheld import withheld

HOOKS = {
    "on_train_batch_start": (),
    "on_train_batch_end": (0,),
    "on_train_epoch_start": (),
    "on_train_epoch_end": (),
    "on_before_zero_grad": (),
    "on_before_backward": (0,),
    "on_after_backward": (),
    "on_before_optimizer_step": (),
}
"""Hook → the places of its arguments that are private. (The batch that hooks get is a placeholder.)"""

_LIGHTNINGS = ("lightning", "pytorch_lightning", "lightning_dp")


class UserHooks:
    """Runs the hooks of the module and of the user's callbacks so that no later step depends on examples through them.

    Guarantee:
        A hook that changes state which a step can read runs again, from the state before it, on a stand-in for its private
        arguments, with logged numbers, metrics and what training_step has left hidden. What that leaves is kept; if the hook
        itself has left something else, it is refused. A hook that changes no such state runs once.

    Args:
        logs: of whose module, and what passes have left.
        public: names of attributes that may change by hooks all the same, because the user says that they are public.
    """

    def __init__(self, logs: StepCapture, public: Sequence[str] = ()) -> None:
        self._logs, self._public = logs, tuple(public)
        self._watched: list[tuple[Any, str]] = []
        self._stateful: set[tuple[int, str]] = set()
        self._beside = CallbackState((), ())

    def watch(self) -> None:
        """Stand between Lightning and the hooks, from here on."""
        module = self._logs.module
        trainer: Any = module.trainer
        for callback in trainer.callbacks:
            self._watch(callback, 2)
        self._watch(module, 0)
        theirs = {id(owner): owner for owner, _ in self._watched if owner is not module}
        self._beside = CallbackState(theirs.values(), module.modules())

    def rest(self) -> None:
        """Leave the hooks as they were found."""
        for owner, name in self._watched:
            if isinstance(owner.__dict__.get(name), Instead):
                del owner.__dict__[name]
        self._watched = []

    def _watch(self, owner: Any, before: int) -> None:
        for name, private in HOOKS.items():
            if owner is self._logs.module and not overridden(name, owner):
                continue
            if name not in owner.__dict__ and _is_users(getattr(owner, name)):
                run = partial(self._run, owner, name, getattr(owner, name), [before + place for place in private])
                owner.__dict__[name] = Instead(owner, name, _Hook(getattr(owner, name), run))
                self._watched.append((owner, name))

    def _run(
        self, owner: Any, name: str, hook: Callable[..., Any], private: list[int], *args: Any, **options: Any
    ) -> Any:
        module = self._logs.module
        if self._logs.is_listening:  # done to an example, see lightning_dp.step.batch_hooks
            return hook(*args, **options)
        before = _State(module, self._public)
        try:
            outcome = hook(*args, **options)
        except BaseException:  # half-way, with what it has left so far from private values
            before.put_back(*before.changed())
            raise
        places, tensors = before.changed()
        if not places and not tensors and (id(owner), name) not in self._stateful:
            return outcome
        self._stateful.add((id(owner), name))
        real = before.now(places, tensors)
        after = _State(module, self._public)
        before.put_back(places, tensors)
        failure: Exception | None = None
        given = [_emptied(arg) if place in private else arg for place, arg in enumerate(args)]
        try:
            with self._without_data(module):
                hook(*given, **options)
        except Exception as error:  # it cannot do without the data, or asks for what is withheld
            failure = error
        left = before.changed()
        found = before.now(*left)
        different = [where for where in {**real, **found} if failure or not same(real.get(where), found.get(where))]
        if not different:
            return outcome
        before.put_back(*left)
        attributes = [_attribute(module, where) for where in different]
        readable = names_read_by_steps(module)
        if any(one is None or one[1] in readable for one in attributes):
            raise _depends(owner, name, hook, different, failure)
        for one in attributes:
            if one is not None:
                hide(*one)
        after.put_back_all()
        return outcome

    @contextlib.contextmanager
    def _without_data(self, module: pl.LightningModule) -> Any:
        trainer, said = module.trainer, io.StringIO()
        stop = trainer.should_stop
        with (
            warnings.catch_warnings(),
            isolate_rng(),
            self._logs.muted(),
            left_hidden(module),
            self._beside.as_at_first(),
            states_hidden(outermost_metrics(module)),
            withheld(trainer, self._logs.loader, self._logs.logged_names),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            try:
                yield
            finally:
                trainer.should_stop = stop


class _Hook:
    """The hook with the name and signature of the original, by which Lightning tells that it is overridden."""

    def __init__(self, hook: Any, run: Callable[..., Any]) -> None:
        plain = getattr(hook, "__func__", hook)
        self.__dict__.update(getattr(plain, "__dict__", {}))
        self.__wrapped__, self.__name__, self.__doc__ = hook, plain.__name__, plain.__doc__
        self.__module__, self.__qualname__ = plain.__module__, plain.__qualname__
        self.__code__ = getattr(plain, "__code__", None)
        self._run = run

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._run(*args, **options)


class _State:
    """All that a step can read, and the gradients, before a hook."""

    def __init__(self, module: nn.Module, public: tuple[str, ...]) -> None:
        self._module, self._reach = module, reach_of(module)
        self._public = public
        self._add_optimizers(module)
        tensors = self._tensors()
        self._contents = Contents.of(tensors, self._reach.arrays)
        copies = self._contents.copies
        self._kept = {name: copies[name] if name in copies else one.detach().clone() for name, one in tensors.items()}
        self._attributes = [(one, dict(one.__dict__)) for one in module.modules()]
        self._gradients = [(p, p.grad) for p in module.parameters()]

    def _add_optimizers(self, module: Any) -> None:
        for place, optimizer in enumerate(module.trainer.optimizers):
            self._reach.walk(f"optimizer {place}, param_groups", optimizer.param_groups)

    def _tensors(self) -> dict[str, Tensor]:
        found = dict(self._reach.tensors)
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


def _attribute(module: nn.Module, where: str) -> tuple[nn.Module, str] | None:
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


_BESIDE = {"__init__", "state_dict", "load_state_dict", "setup", "teardown", "prepare_data"}
_BETWEEN = ("on_", "configure_", "validation_", "test_", "predict_")


def _emptied(argument: Any) -> Any:
    if argument is None:
        return None
    return without_content(argument, emptied_object)


def _is_users(function: Any) -> bool:
    return str(getattr(function, "__module__", "")).split(".")[0] not in _LIGHTNINGS


def _depends(owner: Any, name: str, hook: Any, names: list[str], failure: Exception | None) -> PreflightError:
    code = getattr(getattr(hook, "__func__", hook), "__code__", None)
    line = "" if code is None else f" ({Line(code.co_filename, code.co_firstlineno, code.co_name)})"
    what = ", ".join(name_of(where) for where in names[:5]) or "the state of the module"
    why = "" if failure is None else f" On a batch without data it failed with {type(failure).__name__}: {failure}."
    return PreflightError(
        f"{type(owner).__name__}.{name} changes {what} by what it learns from private examples{line}: expected what a step can "
        f"read to follow from released weights and public numbers.{why} It would carry these examples into the gradients of "
        "later ones, past every clip norm, and leave with the checkpoint without noise. Log it, keep it in the callback, or "
        f"compute it from weights. If it is public all the same, say so: DifferentialPrivacy(public_state=[{_first(names)!r}])."
    )


def _first(names: list[str]) -> str:
    return names[0].split(".")[0].split("[")[0] if names else "name"
