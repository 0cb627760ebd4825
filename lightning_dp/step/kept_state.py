"""Whatever a training step can read is what it was before each pass: put back where that can be done, refused where not."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from lightning_dp.errors import PreflightError
from lightning_dp.step.attributes import left_on
from lightning_dp.step.contents import Contents
from lightning_dp.step.places import OpaquePlace, Place
from lightning_dp.step.reach import Reach


class KeptState:
    """The state of a module: all that its training_step can read beside its batch.

    Guarantee:
        Of two passes through training_step, neither finds anything that the other has left: what Python holds is put back
        after each pass, and a step in which a tensor or array was written to is refused before anything of it is released.

    Args:
        module: the user's.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._reach: Reach | None = None
        self._told: set[str] = set()

    def contents(self) -> Contents:
        """What the tensors and arrays hold now."""
        reach = self._reached()
        return Contents.of(reach.tensors, reach.arrays)

    @contextmanager
    def put_back_after(self) -> Iterator[None]:
        """Put back, when it closes, whatever a pass through training_step has left in Python.

        Raises:
            PreflightError: an iterator has moved on, which cannot be undone.
        """
        reach = self._reached()
        places = reach.places
        try:
            yield
        finally:
            left = [place for place in places if place.differs()]
            for place in left:
                place.put_back()
        if left:
            self._tell(left, reach.libraries)

    def _reached(self) -> Reach:
        """Everything within reach now; walked to anew only if something has changed."""
        if self._reach is None or self._reach.in_shards or any(place.differs() for place in self._reach.places):
            self._reach = reach_of(self._module)
        return self._reach

    def _tell(self, left: list[Place], libraries: list[str]) -> None:
        for place in left:
            if isinstance(place, OpaquePlace):
                raise PreflightError(
                    f"training_step moves {name_of(place.where)} on, an iterator: expected it to read nothing that another "
                    "example's pass has moved. It runs once for each example. Let the dataset bring what it needs."
                )
        within = tuple(f"{name}{end}" for name in libraries for end in ".[")
        left = [place for place in left if place.where not in libraries and not place.where.startswith(within)]
        names = sorted({name_of(place.where) for place in left} - self._told)
        self._told.update(names)
        if names:
            rank_zero_warn(
                f"training_step changes {', '.join(names[:5])}: put back after each example, so that no later one depends on "
                "it: expected a training_step that reads weights and its batch. A count or an average over examples stays "
                "what it was at the start; log it, or move it from public values in on_train_batch_end."
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
