"""What a replay notes at every step, and what is done to make it note that."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from typing_extensions import override

from lightning_dp.audit.hidden_state import hidden_state
from lightning_dp.audit.sketch import Leaf, leaves, row, sketch
from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.engines.accumulate import Accumulated
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine, LossFunction
from lightning_dp.engines.rounded import RoundedEngine
from lightning_dp.engines.select import Selection
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.mechanism.adaptive import INDICATOR, released_beside
from lightning_dp.mechanism.grid import SHORTER
from lightning_dp.mechanism.state import MechanismState
from lightning_dp.plan.correlation import Correlation
from lightning_dp.step.open_step import MicroBatches, OpenStep
from lightning_dp.step.planned import Run
from lightning_dp.step.tally import Tally
from lightning_dp.step.undone import undone

Sketches = dict[str, Tensor]
"""Parameter → a sketch of its gradient."""


@dataclass
class Sum:
    """One sum of clipped gradients. All of it is **private**.

    Attributes:
        engine: that made it.
        contributions: example (or user) → its clipped gradient, by a backward pass of its own.
        norms: example → the length of that.
        inputs: example → what training_step got.
        total: parameter → the engine's sum.
        off: by how much the engine's sum differs from the sum of the contributions.
        rounding: by how much it may, where gradients are rounded to a grid.
        where: the parameter in which it differs most.
        is_random: whether the contributions depend on random numbers, which another engine draws otherwise.
    """

    engine: str
    contributions: dict[int, Sketches] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    inputs: dict[int, list[Leaf]] = field(default_factory=dict)
    total: dict[str, Tensor] = field(default_factory=dict)
    off: float = 0.0
    rounding: float = 0.0
    where: str = ""
    is_random: bool = False


@dataclass(frozen=True)
class Release:
    """One release: parameter → noisy gradient, the noise that it has, and what the mechanism carries on."""

    released: dict[str, Tensor]
    noise: dict[str, Tensor]
    noise_std: float
    carried: MechanismState


@dataclass
class StepNotes:
    """What was noted of one step.

    Attributes:
        number: of the step.
        bound: S, of the length of an example's contribution: C, or what it is together with what adapts C.
        drawn: the numbers of the examples (or users) in it.
        leaving: all that a checkpoint before the step holds.
        hidden: what else a step can read, for finding out why something differs.
        sums: of clipped gradients, in their order.
        releases: likewise.
    """

    number: int
    bound: float
    drawn: list[int]
    leaving: dict[str, Leaf]
    hidden: dict[str, Leaf]
    sums: list[Sum] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)


@dataclass
class Recording:
    """A run, as it was noted.

    Attributes:
        given: the run whose releases this one is given, ``None`` for its own.
        steps: in their order.
        leaving: what a checkpoint at the end holds.
        hidden: what else there was at the end.
        correlation: of the noise over the steps, ``None`` if it is independent.
    """

    given: Recording | None = None
    steps: list[StepNotes] = field(default_factory=list)
    leaving: dict[str, Leaf] = field(default_factory=dict)
    hidden: dict[str, Leaf] = field(default_factory=dict)
    correlation: Correlation | None = None

    def open_step(self, run: Run, sample: LogicalBatch, rest: tuple[Any, ...], tally: Tally) -> OpenStep:
        """Opens a step that is noted here."""
        step = WatchedStep(run, sample, rest, tally, recording=self)
        module = step.run.planned.module
        drawn = [int(number) for piece in step.sample.pieces for number in piece.units]
        bound, left = step.mechanism.sensitivity, leaving(module.trainer)
        self.correlation = step.mechanism.noise.correlation
        self.steps.append(StepNotes(step.sample.step, bound, drawn, left, hidden_state(module)))
        return step

    def end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Note what is there after the run."""
        self.leaving, self.hidden = leaving(trainer), hidden_state(module)


class _Kept(CheckpointIO):
    """Keeps a checkpoint instead of writing it."""

    def __init__(self) -> None:
        self.checkpoint: Any = None

    @override
    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        self.checkpoint = checkpoint

    @override
    def load_checkpoint(self, path: Any, *_: Any, **__: Any) -> Any:
        return self.checkpoint

    @override
    def remove_checkpoint(self, path: Any) -> None:
        pass


def leaving(trainer: pl.Trainer) -> dict[str, Leaf]:
    """All that a checkpoint of the Trainer would hold now, but for this package's ledger."""
    kept, before = _Kept(), trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = kept
    try:
        trainer.save_checkpoint("verify.ckpt")
    finally:
        trainer.strategy.checkpoint_io = before
    checkpoint = dict(kept.checkpoint)
    ours = [key for key in checkpoint.get("callbacks", {}) if key.startswith("DifferentialPrivacy")]
    checkpoint["callbacks"] = {key: value for key, value in checkpoint.get("callbacks", {}).items() if key not in ours}
    return leaves(checkpoint)


class _OneByOne(LoopEngine):
    """The loop, which notes every example's clipped gradient."""

    def __init__(self, numbers: list[int], notes: Sum, *, in_place_of_others: bool) -> None:
        super().__init__(in_place_of_others=in_place_of_others)
        self._numbers, self._notes, self.sum = iter(numbers), notes, dict[str, Tensor]()

    @override
    def note(self, clipped: Mapping[str, Tensor], norm: Tensor) -> None:
        number = next(self._numbers)
        self._notes.contributions[number] = {name: sketch(part) for name, part in clipped.items()}
        self._notes.norms[number] = _length(clipped)
        for name, part in clipped.items():
            self.sum[name] = self.sum[name] + part.double() if name in self.sum else part.detach().double().clone()


def _length(parts: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.detach().double().square().sum()) for part in parts.values()))


@dataclass(frozen=True)
class WatchedStep(OpenStep):
    """An open step that notes what it does. The engine's sum is used, and each example is worked on once more, alone.

    Attributes:
        recording: where it is noted.
    """

    recording: Recording = field(default_factory=Recording)

    @override
    def clipped_sum(
        self,
        selection: Selection,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        micro_batches: MicroBatches,
    ) -> Accumulated:
        planned, step = self.run.planned, self.recording.steps[-1]
        notes, kept = Sum(selection.engine.name), list[tuple[Any, int]]()

        def passing() -> Iterator[tuple[Any, int]]:
            for micro_batch in micro_batches:
                kept.append(micro_batch)
                yield micro_batch

        def alone(micro_batches: list[tuple[Any, int]]) -> tuple[_OneByOne, Sum]:
            found = Sum("loop")
            engine = _OneByOne(step.drawn, found, in_place_of_others=not selection.engine.is_reference)
            other = replace(self, tally=Tally(carried=self.tally.carried))
            with undone(planned.module):
                OpenStep.clipped_sum(other, _only(self._rounded(engine)), loss_function, parameters, micro_batches)
            return engine, found

        if selection.engine.is_reference:
            engine = _OneByOne(step.drawn, notes, in_place_of_others=False)
            total = super().clipped_sum(_only(self._rounded(engine)), loss_function, parameters, passing())
        else:
            total = super().clipped_sum(selection, loss_function, parameters, passing())
            engine, found = alone(kept)
            notes.contributions, notes.norms = found.contributions, found.norms
        numbers = iter(step.drawn)
        notes.inputs = {next(numbers): row(batch_of_one(batch, at)) for batch, size in kept for at in range(size)}
        notes.total = {name: self._in_numbers(part).cpu().clone() for name, part in total.gradient.items()}
        apart = {
            name: engine.sum[name].cpu() - part.double() for name, part in notes.total.items() if name in engine.sum
        }
        if apart:
            notes.off, notes.where = _length(apart), max(apart, key=lambda name: _length({"": apart[name]}))
        units, coordinates = planned.ledger.plan.resolution, sum(part.numel() for part in notes.total.values())
        if units is not None:
            each = math.sqrt(coordinates) / units + 1.0 - SHORTER
            notes.rounding = len(step.drawn) * each * step.bound
        if notes.off > notes.rounding + 1e-6 * step.bound:
            again = alone([(batch.with_other_draws(), size) for batch, size in kept])[1].contributions
            notes.is_random = any(
                not torch.equal(again[number][name], part)
                for number, parts in notes.contributions.items()
                for name, part in parts.items()
            )
        step.sums.append(notes)
        return total

    @override
    def release(self, gradient: Mapping[str, Tensor], *, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        mechanism, steps, given = self.mechanism, self.recording.steps, self.recording.given
        sums = {name: self._in_numbers(total).double().cpu() for name, total in gradient.items()}
        released = super().release(gradient, part=part, parts=parts)
        every = {name: found.double().cpu() for name, found in released.items()}
        if INDICATOR in sums:
            every[INDICATOR] = torch.tensor(released_beside(self.tally.carried), dtype=torch.float64)
        noise = {name: found * mechanism.divisor - sums[name] for name, found in every.items()}
        std = (
            mechanism.noise.noise_multiplier * mechanism.sensitivity * parts**0.5
        )  # not by the property that the noise reads
        kept = {
            name: found.detach().cpu().clone() for name, found in released.items()
        }  # what becomes p.grad may be written to
        steps[-1].releases.append(Release(kept, noise, std, self.tally.carried))
        number, place = len(steps) - 1, len(steps[-1].releases) - 1
        if given is None or number >= len(given.steps) or place >= len(given.steps[number].releases):
            return released
        self.tally.carried = given.steps[number].releases[place].carried
        theirs = given.steps[number].releases[place].released
        return {
            name: theirs[name].to(found.device, copy=True) if name in theirs else found
            for name, found in released.items()
        }

    def _rounded(self, engine: Engine) -> Engine:
        resolution = self.run.planned.ledger.plan.resolution
        return engine if resolution is None else RoundedEngine(engine, resolution)

    def _in_numbers(self, total: Tensor) -> Tensor:
        """A sum, where it is in units of a grid, in the gradient's own."""
        mechanism = self.mechanism
        units = mechanism.noise.resolution
        return total if units is None else total.double() * (mechanism.sensitivity / units)


def _only(engine: Engine) -> Selection:
    return Selection(engine)
