"""Whatever a training step can read is what it was before each pass: put back where that can be done, refused where not."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_dp.engines.user_code import Line
from lightning_dp.engines.writes import line_that_changes
from lightning_dp.errors import PreflightError
from lightning_dp.step.attributes import left_on
from lightning_dp.step.contents import Contents
from lightning_dp.step.places import DictPlace, GeneratorPlace, OpaquePlace, Place
from lightning_dp.step.reach import Reach
from lightning_dp.step.trainer_state import optimizer_tensors, trainer_reach

T = TypeVar("T")
_STEP = "training_step"


class KeptState:
    """The state of a module: all that its training_step can read beside its batch.

    Guarantee:
        Of two passes through training_step, neither finds anything that the other has left: what Python holds is put back
        after each pass, and a step in which a tensor or array was written to is refused before anything of it is released. A
        pass that sets rate, length or course of training is refused where it does so.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._reach: Reach | None = None
        self._beside: Reach | None = None
        self._told: set[str] = set()
        self._passing = self._in_order = self._on_course = False

    @contextmanager
    def passing(self) -> Iterator[Callable[[], None]]:
        """While open, passes follow each other: what one has put back the next need not compare again.

        Yields:
            What has to be called whenever anything else has run, such as a data set or a hook.
        """

        def anything_else_ran() -> None:
            self._in_order = self._on_course = False

        anything_else_ran()
        self._passing = True
        try:
            yield anything_else_ran
        finally:
            self._passing = False
            anything_else_ran()

    def contents(self) -> Contents:
        """What the tensors and arrays hold now."""
        reach = self._reached()
        trainer = getattr(self._module, "_trainer", None)
        kept = {} if trainer is None else optimizer_tensors(trainer)
        return Contents.of({**reach.tensors, **kept}, reach.arrays)

    def alone(self, run: Callable[[], T], what: str) -> T:
        """Run something else on one example, which leaves nothing either, and steers nothing."""
        self._in_order = self._on_course = False
        try:
            with self.put_back_after(what):
                return self.unsteered(run, what, strictly=True)
        finally:
            self._in_order = self._on_course = False

    def unsteered(self, run: Callable[[], T], what: str = _STEP, *, strictly: bool = False) -> T:
        """Run a pass through training_step, which may not steer training: what it sees is one example.

        Under manual optimization, whose training_step runs once more without data for all that it commands, what a pass
        leaves is put back.

        Raises:
            PreflightError: it has set a rate, a number of steps or anything else of the Trainer, with the line.
        """
        module: Any = self._module
        if getattr(module, "_trainer", None) is None:
            return run()
        if self._beside is None or not (self._on_course or self._beside.renew()):
            self._beside = trainer_reach(module)
        self._on_course = False
        places = self._beside.places

        def differ() -> list[Place]:
            return [place for place in places if place.differs()]

        def put_back(found: list[Place]) -> list[str]:
            names = [name for place in found for name in _names(place)]
            for place in found:
                place.put_back()
            return names

        try:
            outcome = run()
        except BaseException:
            put_back(differ())
            raise
        names = put_back(differ())
        if names and (strictly or module.automatic_optimization):
            line = line_that_changes(run, lambda: bool(differ()))
            put_back(differ())
            raise _steers(what, names, line)
        self._on_course = self._passing
        return outcome

    @contextmanager
    def put_back_after(self, what: str = _STEP) -> Iterator[None]:
        """Put back, when it closes, whatever a pass through training_step has left in Python.

        Args:
            what: is passed through, for messages.

        Raises:
            PreflightError: an iterator has moved on, which cannot be undone.
        """
        reach = self._reach if self._in_order and self._reach is not None else self._reached()
        places, self._in_order = reach.places, False
        try:
            yield
        finally:
            left = [place for place in places if place.differs()]
            told = [
                place for place in left if what == _STEP or not isinstance(place, GeneratorPlace)
            ]  # hooks' are seeded
            named = [name for place in told for name in (_names(place) if place.where == "self" else [place.where])]
            for place in left:
                place.put_back()
            self._in_order = self._passing and not reach.in_shards
        if left:
            self._tell(what, left, named, reach.libraries)

    def _reached(self) -> Reach:
        """Everything within reach now; walked to anew only if something has changed."""
        if self._reach is None or self._reach.in_shards or not self._reach.renew():
            self._reach = reach_of(self._module)
        return self._reach

    def _tell(self, what: str, left: list[Place], named: list[str], libraries: list[str]) -> None:
        for place in left:
            if isinstance(place, OpaquePlace):
                raise PreflightError(
                    f"{what} moves {name_of(place.where)} on, an iterator: expected it to read nothing that another "
                    "example's pass has moved. It runs once for each example. Let the dataset bring what it needs."
                )
        within = tuple(f"{name}{end}" for name in libraries for end in ".[")
        own = [name for name in named if name not in libraries and not name.startswith(within)]
        names = sorted({name_of(name) for name in own} - self._told)
        self._told.update(names)
        if names:
            rank_zero_warn(
                f"{what} changes {', '.join(names[:5])}: put back after each example, so that no later one depends on it: "
                "expected it to read weights and its batch. A count or an average over examples stays "
                "what it was at the start; log it, or move it from public values in on_train_batch_end."
            )


def _names(place: Place) -> list[str]:
    if not isinstance(place, DictPlace):
        return [place.where]
    if place.named is None:
        return [f"{place.where}[{name!r}]" for name in place.moved()]
    return [f"{place.named}{name}" for name in place.moved()]


def _steers(what: str, names: list[str], line: Line | None) -> PreflightError:
    return PreflightError(
        f"{what} sets {', '.join(names[:5])}{'' if line is None else f' ({line})'}: expected it to leave the course of "
        "training alone. It runs once for each example, and a rate or a number of steps that it takes from one would leave "
        "with the weights, past every clip norm. Give rates to a scheduler of configure_optimizers, or set them in "
        "on_train_batch_start from public numbers such as trainer.global_step; end training by max_steps, or by a validation "
        "metric."
    )


def reach_of(module: nn.Module) -> Reach:
    """Everything within reach of a module now."""
    reach = Reach(hidden_on)
    reach.walk("", module)
    return reach


def hidden_on(module: nn.Module) -> Collection[str]:
    """The attributes that passes do not see as they are."""
    return left_on(module)


def name_of(where: str) -> str:
    """A place's name for people: an attribute of the module as such."""
    return where if " " in where or where == "self" or not where else f"self.{where}"
