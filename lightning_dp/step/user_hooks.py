"""Hooks of the user's own between two passes: what they do to the state that a step can read follows from nobody's data."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.engines.user_code import Line, no_end_of_the_data
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import overridden
from lightning_dp.loading.placeholder import emptied_object, without_content
from lightning_dp.mechanism.instead import Instead
from lightning_dp.mechanism.same import same
from lightning_dp.step.attributes import hide, left_hidden, left_on
from lightning_dp.step.callback_state import CallbackState
from lightning_dp.step.hook_state import HookState, Reached, attribute_of, names_read_by_steps, names_used
from lightning_dp.step.kept_state import name_of
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.metrics import names_of_trained, outermost_metrics, states_hidden
from lightning_dp.step.reach import names_in
from lightning_dp.step.withheld import withheld

HOOKS = {
    "on_train_batch_start": (),
    "on_train_batch_end": (0,),
    "on_train_epoch_start": (),
    "on_train_epoch_end": (),
    "on_train_end": (),
    "on_before_zero_grad": (),
    "on_before_backward": (0,),
    "on_after_backward": (),
    "on_before_optimizer_step": (),
}
"""Hook → the places of its arguments that are private. (The batch that hooks get is a placeholder.)"""

VALIDATION = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "validation_step",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)
"""Hooks that work on released weights and on validation data, unless they ask for what is private."""

_METRICS = frozenset({"callback_metrics", "logged_metrics", "progress_bar_metrics"})
_ASKS = frozenset({"train_dataloader", "datamodule", "callbacks"})
"""Names by which a hook of validation gets at what is private."""

MOST_REPEATED = 10_000
"""So many calls of a callback's hooks are made up for on the stand-in."""

COMMANDS = ("optimizer_step", "optimizer_zero_grad", "configure_gradient_clipping", "lr_scheduler_step")
"""What a module may do in Lightning's place. It runs once, and does not end the run."""

SKIP = -1
"""What ``on_train_batch_start`` returns to leave out the rest of an epoch."""

_LIGHTNINGS = ("lightning", "pytorch_lightning", "lightning_dp")


_Call = tuple[Callable[..., Any], list[int], tuple[Any, ...], dict[str, Any]]
"""A hook, the places of its private arguments, and what it was given."""


class UserHooks:
    """Runs the hooks of the module and of the user's callbacks so that no later step depends on examples through them.

    Guarantee:
        A hook that changes state which a step can read, or what steers it, runs again, from the state before it, on a stand-in
        for its private arguments, with logged numbers, metrics and what training_step has left hidden. What that leaves is
        kept; if the hook itself has left something else, it is refused. A hook that changes no such state runs once. The first
        time that one does, it also runs on a second stand-in with other values, and the two must agree: otherwise it could tell
        by *when* it begins. No hook ends the run.

    Args:
        logs: of whose module, and what passes have left.
        public: names of attributes that may change by hooks all the same, because the user says that they are public.
    """

    def __init__(self, logs: StepCapture, public: Sequence[str] = ()) -> None:
        self._logs, self._public = logs, tuple(public)
        self._watched: list[tuple[Any, str]] = []
        self._stateful: set[tuple[int, str]] = set()
        self._beside = CallbackState((), ())
        self._missed: dict[int, list[str]] = {}
        self._calls: dict[tuple[int, str], _Call] = {}
        self._reached: Reached | None = None

    def watch(self) -> None:
        """Stand between Lightning and the hooks, from here on."""
        module = self._logs.module
        trainer: Any = module.trainer
        for callback in trainer.callbacks:
            self._watch(callback, 2)
        self._watch(module, 0)
        theirs = {id(owner): owner for owner, _ in self._watched if owner is not module}
        self._missed = {number: [] for number in theirs}
        self._beside = CallbackState(theirs.values(), module.modules())
        for owner in (*trainer.callbacks, module):
            for name in VALIDATION:
                hook = getattr(owner, name, None)
                if hook is not None and _is_users(hook) and (owner is not module or overridden(name, owner)):
                    self._stand_before(owner, name, partial(self._in_validation, owner, name, hook))
        for name in COMMANDS:
            if overridden(name, module):
                self._stand_before(module, name, partial(self._command, name, getattr(module, name)))

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
            if _is_users(getattr(owner, name)):
                places = [before + place for place in private]
                self._stand_before(owner, name, partial(self._run, owner, name, getattr(owner, name), places))

    def _stand_before(self, owner: Any, name: str, run: Callable[..., Any]) -> None:
        there = owner.__dict__.get(name)
        if not isinstance(there, Instead):
            owner.__dict__[name] = Instead(owner, name, _Hook(getattr(owner, name), run), there)
            self._watched.append((owner, name))

    def _run(
        self,
        owner: Any,
        name: str,
        hook: Callable[..., Any],
        private: list[int],
        *args: Any,
        _noted: list[str] | None = None,
        **options: Any,
    ) -> Any:
        module = self._logs.module
        if self._logs.is_listening:  # done to an example, see lightning_dp.step.batch_hooks
            return hook(*args, **options)
        before, own = self._before(), self._own(owner)
        try:
            with no_end_of_the_data(f"{type(owner).__name__}.{name}"), self._noting(_noted):
                outcome = hook(*args, **options)
        except BaseException:  # half-way, with what it has left so far from private values
            before.put_back(*before.changed())
            raise
        places, tensors = before.changed()
        skips = name == "on_train_batch_start" and type(outcome) is int and outcome == SKIP
        first = (id(owner), name) not in self._stateful
        call = (hook, private, args, options)
        if _noted == [] and first:  # it has asked for nothing private
            return outcome
        if not (places or tensors or skips) and first:
            self._miss(owner, name, call)
            self._reached = before.reached
            return outcome
        self._stateful.add((id(owner), name))
        real = {**before.now(places, tensors), **({_EPOCH: SKIP} if skips else {})}
        after = HookState(module, self._public)
        before.put_back(places, tensors)
        others: dict[str, Any] | None = None
        self._make_up(owner, before)
        if first and private:
            others, failure, left = self._on_stand_in(before, name, call, _filled, own)
            others = None if failure else others
            before.put_back(*left)
        found, failure, left = self._on_stand_in(before, name, call, _emptied, own)
        both = {**real, **found, **(others or {})}
        different = [
            where
            for where in both
            if failure
            or not same(real.get(where), found.get(where))
            or (others is not None and not same(others.get(where), found.get(where)))
        ]
        if not different:
            return outcome
        before.put_back(*left)
        attributes = [attribute_of(module, where) for where in different]
        readable = names_read_by_steps(module)
        if any(one is None or one[1] in readable for one in attributes):
            raise _depends(owner, name, hook, different, failure)
        for one in attributes:
            if one is not None:
                hide(*one)
        after.put_back_all()
        return outcome

    def _before(self) -> HookState:
        """The state as it is now; what the last hook was compared by is used again, by one at a time, where it still holds."""
        reached, self._reached = self._reached, None
        module = self._logs.module
        return HookState(module, self._public, reached if reached is not None and reached.renew() else None)

    def _on_stand_in(
        self, before: HookState, name: str, call: _Call, instead: Callable[[Any], Any], own: CallbackState | None
    ) -> tuple[dict[str, Any], Exception | None, Any]:
        """Run a hook without anybody's data: what it leaves, why it failed if it did, and where it has left something."""
        hook, private, args, options = call
        failure: Exception | None = None
        outcome: Any = None
        try:
            with (
                self._without_data(keep=instead is _emptied, shared=self._shared() if name in VALIDATION else []),
                nullcontext() if own is None else own.on_stand_in(keep=False),
            ):
                outcome = hook(*(instead(arg) if at in private else arg for at, arg in enumerate(args)), **options)
        except Exception as error:  # it cannot do without the data, or asks for what is withheld
            failure = error
        left = before.changed()
        found = before.now(*left)
        if name == "on_train_batch_start" and type(outcome) is int and outcome == SKIP:
            found[_EPOCH] = SKIP
        return found, failure, left

    def _noting(self, noted: list[str] | None) -> AbstractContextManager[None]:
        if noted is None:
            return nullcontext()
        return withheld(self._logs.module.trainer, self._logs.loader, self._logs.logged_names, noted=noted)

    def _own(self, owner: Any) -> CallbackState | None:
        """What a callback keeps that has hooks of validation alone: on the stand-in it is what it was before the hook."""
        module = self._logs.module
        return None if owner is module or id(owner) in self._missed else CallbackState([owner], module.modules())

    def _shared(self) -> list[Any]:
        """The loaders of validation data, which its hooks may read."""
        return pytree.tree_leaves(self._logs.module.trainer.val_dataloaders)

    def _miss(self, owner: Any, name: str, call: _Call) -> None:
        """Remember that a callback's hook has run, and not on the stand-in, where it may count."""
        missed = self._missed.get(id(owner))
        if missed is not None and len(missed) < MOST_REPEATED:
            missed.append(name)
            self._calls[id(owner), name] = call

    def _make_up(self, owner: Any, before: HookState) -> None:
        """Run on the stand-in what a callback's hooks have run otherwise so far, for what they count there."""
        missed = self._missed.get(id(owner), [])
        for name in missed:
            self._on_stand_in(before, name, self._calls[id(owner), name], _emptied, None)
        if missed:
            before.put_back(*before.changed())
            missed.clear()

    def _in_validation(self, owner: Any, name: str, hook: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A hook of validation: as a hook of training if it may get at what is private; otherwise it gets at nothing."""
        module, trainer = self._logs.module, self._logs.module.trainer
        private, names = {*_ASKS, *left_on(module), *names_of_trained(module)}, names_used(hook, owner)
        if id(owner) in self._missed or names & private:
            return self._run(owner, name, hook, [], *args, **options)
        if names & _METRICS:  # of training, or of validation
            noted: list[str] = []
            return self._run(owner, name, hook, [], *args, _noted=noted, **options)
        with withheld(trainer, self._logs.loader, self._logs.logged_names, shared=self._shared()):
            return hook(*args, **options)

    def _command(self, name: str, command: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """A command of the module's own; the loss that its closure returns is a zero, as the optimizer's is."""
        if name == "optimizer_step":
            args = tuple(_without_loss(arg) for arg in args)
            options = {key: _without_loss(arg) for key, arg in options.items()}
        module = self._logs.module
        code = getattr(getattr(command, "__func__", command), "__code__", None)
        with no_end_of_the_data(f"{type(module).__name__}.{name}"):
            outcome = command(*args, **options)
        private = set() if code is None else set(left_on(module)) & set(names_in(code))
        if code is not None and private and name != "lr_scheduler_step":
            line = Line(code.co_filename, code.co_firstlineno, code.co_name)
            raise PreflightError(
                f"{type(module).__name__}.{name} reads self.{min(private)}, which training_step has left ({line}): expected it "
                "to do without. It decides on the step, and that must not depend on private examples."
            )
        return outcome

    @contextlib.contextmanager
    def _without_data(self, *, keep: bool, shared: Sequence[Any]) -> Any:
        """While open, nothing private is to be found but in ``shared`` loaders; ``keep`` what callbacks count meanwhile."""
        module, said = self._logs.module, io.StringIO()
        with (
            warnings.catch_warnings(),
            isolate_rng(),
            self._logs.muted(),
            left_hidden(module),
            self._beside.on_stand_in(keep=keep),
            states_hidden(outermost_metrics(module)),
            withheld(module.trainer, self._logs.loader, self._logs.logged_names, shared=shared),
            contextlib.redirect_stdout(said),
            contextlib.redirect_stderr(said),
        ):
            warnings.simplefilter("ignore")
            yield


_EPOCH = "which batches of an epoch are used"


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


def _emptied(argument: Any) -> Any:
    if argument is None:
        return None
    return without_content(argument, emptied_object)


def _filled(argument: Any) -> Any:
    """A stand-in that has other values than :func:`_emptied` gives: large ones."""
    return pytree.tree_map(
        lambda leaf: (
            torch.full_like(leaf, 1e4)
            if isinstance(leaf, Tensor) and leaf.is_floating_point()
            else 1e4
            if isinstance(leaf, float)
            else leaf
        ),
        _emptied(argument),
    )


def _without_loss(argument: Any) -> Any:
    """A closure of Lightning's that returns a zero for the loss; anything else as it is."""
    if not callable(argument) or isinstance(argument, torch.optim.Optimizer):
        return argument

    def public(*args: Any, **options: Any) -> Any:
        loss = argument(*args, **options)
        return torch.zeros_like(loss) if isinstance(loss, Tensor) else loss

    return public


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
