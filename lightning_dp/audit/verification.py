"""``lightning_dp.verify``: the user's own run, replayed on neighbouring data with the same releases."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_dp.audit.compare import DOUBLE, SINGLE, Found, Tolerance, first_difference, own_fault
from lightning_dp.audit.hidden_state import GENERATORS
from lightning_dp.audit.locate import line_of, line_that_names, owners_of, stage_of_input
from lightning_dp.audit.neighbour import ChosenRecords, Neighbour
from lightning_dp.audit.rank_draws import rank_fault
from lightning_dp.audit.recording import Recording
from lightning_dp.audit.replay import NotCopiedError, Replays, private_of
from lightning_dp.audit.verdict import Difference, Verification
from lightning_dp.engines.user_code import line_of_error
from lightning_dp.validate import whole

PATIENCE = 5.0
"""After so many seconds progress is told."""

COMPARED = (
    "every common example's clipped gradient at every step",
    "the sum, but for at most C",
    "all that a checkpoint holds after every step, but for this package's ledger",
    "the engine's sum and the sum of backward passes one by one",
    "the noise's size, its independence of the sum and from step to step, and the divisor",
    "the draw, and its shares for two and three ranks",
)

NOT_COMPARED = (
    "other steps and other examples than these",
    "what was computed from the data before the loader was made",
    "validation, loggers, printed and logged numbers, and time",
    "several processes",
)


def verify(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    data: DataLoader[Any] | pl.LightningDataModule | None = None,
    *,
    steps: int = 5,
    examples: int = 24,
    remove: int | None = None,
    seed: int = 0,
) -> Verification:
    """Train for a few steps on some of the data, and again on neighbours of it, and compare. The check before a real run.

    The run is the user's own module, ``collate_fn``, transforms, hooks and callbacks, copied for every replay. Each replay has
    the same key and the same random numbers, and is given the releases of the first, so that the weights are the same at every
    step. What then differs between data with and without one example was not protected by noise. All chosen examples take
    part in every step (q = 1); N and B are twice their number, so that no size of the data can stand for them. An example that
    is taken away keeps its number, and nobody draws it, so that random numbers of other examples stay as they are.

    Args:
        trainer: with a :class:`~lightning_dp.DifferentialPrivacy` callback, on one device. Left as it is, like ``module``.
        module: not trained yet.
        data: the training loader or a data module; ``None`` if the module has its own.
        steps: how many each replay takes, at least 2. State shows from the second step on; a warm-up takes more.
        examples: how many examples are chosen, 4 to 64.
        remove: dataset index of the one example to be taken away; ``None`` to choose up to three.
        seed: of all random numbers in the replays. No run uses it.

    Returns:
        What was compared, and the first thing that differs. A violation raises nothing: call ``.check()`` for that.

    Raises:
        ValueError: an argument is out of range, several devices, no privacy callback, or something cannot be copied.
        PreflightError: training is refused, as ``trainer.fit`` would.
        Exception: what training on the chosen examples raises.

    Example:
        ``lightning_dp.verify(trainer, module, datamodule).check()``

    Source: the idea of replaying neighbours is arXiv 2602.17454.
    """
    whole("steps", steps, low=2, high=10_000)
    whole("examples", examples, low=4, high=64)
    whole("seed", seed, low=0)
    if remove is not None:
        whole("remove", remove, low=0)
    if trainer.world_size != 1:
        raise ValueError(f"world_size={trainer.world_size}: expected 1. Verify on one device (Trainer(devices=1)).")
    private_of(trainer)
    return _Verifier(Replays(trainer, module, data, steps, examples, remove, seed)).result()


class _Verifier:
    """Makes the replays one after the other, until something differs."""

    def __init__(self, replays: Replays) -> None:
        self._replays, self._began, self._note = replays, time.monotonic(), ""
        self._double = str(replays.trainer.precision) != "64-true"
        self._base = Recording()
        self._data: ChosenRecords | None = None

    def result(self) -> Verification:
        """The verdict."""
        as_configured = str(self._replays.trainer.precision) != "64-true"
        self._base = self._first()
        self._data = self._replays.last
        found = own_fault(self._base, self._tolerance)
        alone = None if found is None else self._described(found, "on the data")
        difference = alone if found is not None and found.kind != "engine" else None
        if alone is None and self._double and as_configured:
            self._tell(f"in precision {self._replays.trainer.precision}")
            found = own_fault(self._replays.run(None, double=False), SINGLE)
            alone = None if found is None else self._described(found, "on the data, in the Trainer's precision")
            difference = alone if found is not None and found.kind != "engine" else None
        assert self._replays.choice is not None
        for neighbour in self._replays.choice.neighbours:
            if difference is None:
                self._tell(neighbour.name)
                difference = self._against(neighbour)
        difference = difference or alone  # last, because state that passes share shows in the engine's sum as well
        if difference is None and (text := rank_fault(self._replays.seed)):
            difference = Difference.of(
                Found("noise" if "noise" in text else "draw", 0, text), "on several ranks", None, ""
            )
        return self._verification(difference)

    @property
    def _tolerance(self) -> Tolerance:
        single = not self._double and str(self._replays.trainer.precision) != "64-true"
        return SINGLE if single else DOUBLE

    def _first(self) -> Recording:
        """The first run, in double precision if the module can be run so."""
        if self._double:
            try:
                return self._replays.run(None, double=True)
            except NotCopiedError:
                raise
            except Exception as error:
                self._double, self._note = False, f"double precision ({type(error).__name__} in it)"
        return self._replays.run(None, double=False)

    def _against(self, neighbour: Neighbour) -> Difference | None:
        changed = self._replays.number(neighbour.changed) if neighbour.changed is not None else None
        most = 1.0 if neighbour.replaced is None else 2.0
        try:
            other = self._replays.run(neighbour, double=self._double, given=self._base)
        except Exception as error:
            if neighbour.replaced is not None and neighbour.factor != 1.0:  # it may be no example at all any more
                plain = Neighbour(neighbour.name, replaced=neighbour.replaced, by=neighbour.by)
                return self._against(plain)
            if neighbour.replaced is not None:
                self._note = f"an extreme example ({type(error).__name__} with it)"
                return None
            return self._ended(neighbour, error)
        found = first_difference(self._base, other, changed, self._tolerance, most)
        if found is None:
            return None
        described = self._described(found, neighbour.name)
        again = "" if self._repeats() else ", and even on the same data a second time"
        return replace(described, neighbour=f"{neighbour.name}{again}")

    def _ended(self, neighbour: Neighbour, error: Exception) -> Difference:
        line = line_of_error(error)
        text = f"training ends with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        found = Found("steps", 0, f"{text} Expected it to go on as it does with that example")
        return Difference.of(found, neighbour.name, None, "" if line is None else str(line))

    def _repeats(self) -> bool:
        """Whether the same data give the same once more."""
        self._tell("on the same data")
        again = self._replays.run(None, double=self._double, given=self._base)
        return first_difference(self._base, again, None, self._tolerance, 0.0) is None

    def _described(self, found: Found, neighbour: str) -> Difference:
        example = None if found.example is None else self._replays.index_of(found.example)
        return Difference.of(found, neighbour, example, self._code(found))

    def _code(self, found: Found) -> str:
        """The user's line, or as near as can be said."""
        replays = self._replays
        owners = owners_of(replays.module, replays.trainer, replays.data)
        if found.kind == "state":
            line = line_that_names(owners, found.name)
            return f"{line}, which seems to write it" if line else "nothing in the module's own code names it"
        if found.kind not in ("contribution", "total", "steps"):
            return ""
        if not found.same_input and found.example is not None and self._data is not None and replays.last is not None:
            place = found.example if replays.owners is None else replays.owners.index(found.example)
            try:
                what, line = stage_of_input(
                    self._data, replays.last, replays.collate, place, replays.module, replays.data
                )
            except Exception:
                what, line = "the data set, collate_fn or a hook on the way to the device", None
            return f"training_step gets another input; it comes from {what}{f' ({line})' if line else ''}"
        states = [name for name in found.hidden if not name.startswith(GENERATORS)]
        for name in states:
            line = line_that_names(owners, name)
            if line is not None:
                return f"{line}, which seems to write {name}; that differs before the step"
        if states:
            return f"{states[0]} differs before the step"
        drawn = [name.removeprefix(GENERATORS) for name in found.hidden]
        line = line_of(replays.module.training_step)
        random = f"; {', '.join(drawn)} had drawn other numbers before the step" if drawn else ""
        return f"training_step ({line}) or what it calls{random}"

    def _tell(self, what: str) -> None:
        if time.monotonic() - self._began > PATIENCE:
            print(f"lightning_dp: verify, {time.monotonic() - self._began:.0f} s: {what}", file=sys.stderr, flush=True)

    def _verification(self, difference: Difference | None) -> Verification:
        choice = self._replays.choice
        assert choice is not None
        engines = sorted({one.engine for step in self._base.steps for one in step.sums})
        random = any(one.is_random for step in self._base.steps for one in step.sums)
        skipped = [
            *([self._note] if self._note else []),
            *(["the engine's sum, since steps draw random numbers"] if random else []),
        ]
        return Verification(
            ok=difference is None,
            steps=self._replays.steps,
            examples=len(choice.indices),
            precision="double precision"
            if self._tolerance is DOUBLE
            else f"precision {self._replays.trainer.precision}",
            engine=", ".join(repr(engine) for engine in engines),
            neighbours=tuple(neighbour.name for neighbour in choice.neighbours),
            compared=tuple(one for one in COMPARED if not (random and one.startswith("the engine's"))),
            not_compared=(*skipped, *NOT_COMPARED),
            difference=difference,
        )
