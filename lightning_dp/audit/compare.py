"""The first thing in which a run and its replay differ, or in which a run is not what it should be by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from lightning_dp.audit.decorrelated import decorrelated
from lightning_dp.audit.noise_law import Noised, noise_fault
from lightning_dp.audit.recording import Recording, StepNotes, Sum
from lightning_dp.audit.sketch import Leaf

Kind = Literal["state", "draw", "contribution", "clipping", "engine", "total", "noise", "steps"]


@dataclass(frozen=True)
class Found:
    """What differs, and where.

    Attributes:
        kind: of thing.
        step: in which; -1 for before the first.
        text: what was measured.
        example: its number in the run (of a user, if users are drawn), or ``None``.
        name: of the parameter or state.
        same_input: whether training_step got the same for that example.
        hidden: what else differed before the step, of all that it could read.
    """

    kind: Kind
    step: int
    text: str
    example: int | None = None
    name: str = ""
    same_input: bool = True
    hidden: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tolerance:
    """What is taken for rounding.

    Attributes:
        gradients: relative to C.
        state: relative to a tensor's length.
    """

    gradients: float
    state: float


DOUBLE, SINGLE = Tolerance(1e-9, 1e-10), Tolerance(1e-5, 1e-6)


def own_fault(run: Recording, tolerance: Tolerance) -> Found | None:
    """What is wrong with a run by itself: clipping, the engine's sum, the noise."""
    for step in run.steps:
        for one in step.sums:
            found = _clipped(step, one, tolerance)
            if found is not None:
                return found
    noised = [
        Noised(step.number, release.noise, one.total, release.noise_std)
        for step in run.steps
        for one, release in zip(step.sums, step.releases, strict=False)
    ]
    unlikely = noise_fault(decorrelated(noised, run.correlation))
    return None if unlikely is None else Found("noise", unlikely.step, unlikely.text, name=unlikely.name)


def _clipped(step: StepNotes, one: Sum, tolerance: Tolerance) -> Found | None:
    bound = step.bound
    if math.isinf(bound):
        return None
    for number, norm in one.norms.items():
        if not norm <= bound * (1 + tolerance.gradients):
            text = f"its clipped gradient has length {norm:.6g}: expected at most C = {bound:g}"
            return Found("clipping", step.number, text, number)
    if not one.is_random and not one.off <= one.rounding + tolerance.gradients * bound * max(1, len(one.norms)):
        text = (
            f"engine {one.engine!r}: its sum differs by {one.off / bound:.3g}·C from the sum of the {len(one.norms)} "
            "clipped gradients, each by a backward pass of its own"
        )
        return Found("engine", step.number, text, name=one.where)
    return None


def first_difference(
    run: Recording, other: Recording, changed: int | None, tolerance: Tolerance, most: float
) -> Found | None:
    """What differs first between a run and its replay on a neighbour.

    Args:
        run: on the data.
        other: on the neighbour, which was given the first run's releases.
        changed: the number of the one example (or user) that is another or away; ``None`` for the same data.
        tolerance: what is taken for rounding.
        most: by how many C the total may move: 1 for an example taken away, 2 for one replaced, 0 for the same data.
    """
    for mine, theirs in zip(run.steps, other.steps, strict=False):
        found = _state(mine.number - 1, mine.leaving, theirs.leaving, tolerance)
        if found is not None:
            return found
        missing = [number for number in mine.drawn if number != changed and number not in theirs.drawn]
        more = [number for number in theirs.drawn if number not in mine.drawn]
        if missing or more:
            text = (
                f"{len(missing)} of the others are not drawn and {len(more)} are drawn instead: expected the same draw"
            )
            return Found("draw", mine.number, text, [*missing, *more][0])
        hidden = tuple(name for name in mine.hidden if _apart(mine.hidden[name], theirs.hidden.get(name), tolerance))
        for one, two in zip(mine.sums, theirs.sums, strict=False):
            found = _sums(mine, one, two, changed, tolerance, most, hidden)
            if found is not None:
                return found
        found = _noise(mine, theirs, tolerance) or _clipped_all(theirs, tolerance)
        if found is not None:
            return found
        if (len(mine.sums), len(mine.releases)) != (len(theirs.sums), len(theirs.releases)):
            text = f"{len(theirs.releases)} releases instead of {len(mine.releases)}: expected as many"
            return Found("steps", mine.number, text, hidden=hidden)
    if len(run.steps) != len(other.steps):
        text = f"{len(other.steps)} steps instead of {len(run.steps)}: expected a number that the data do not change"
        return Found("steps", min(len(run.steps), len(other.steps)), text)
    return _state(run.steps[-1].number if run.steps else -1, run.leaving, other.leaving, tolerance)


def _clipped_all(step: StepNotes, tolerance: Tolerance) -> Found | None:
    return next((found for one in step.sums if (found := _clipped(step, one, tolerance))), None)


def _apart(mine: Leaf, theirs: Leaf | None, tolerance: Tolerance) -> float:
    return math.inf if theirs is None else mine.differs(theirs, tolerance.state)


def _state(step: int, mine: dict[str, Leaf], theirs: dict[str, Leaf], tolerance: Tolerance) -> Found | None:
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        apart = math.inf if name not in mine else _apart(mine[name], theirs.get(name), tolerance)
        if apart:
            text = "it is another" if math.isinf(apart) else f"it differs by {apart:.3g} of its length"
            return Found("state", step, text, name=name)
    return None


def _sums(
    notes: StepNotes,
    mine: Sum,
    theirs: Sum,
    changed: int | None,
    tolerance: Tolerance,
    most: float,
    hidden: tuple[str, ...],
) -> Found | None:
    step, bound = notes.number, notes.bound
    unit = 1.0 if math.isinf(bound) else bound
    for number, parts in mine.contributions.items():
        if number == changed or number not in theirs.contributions:
            continue
        other = theirs.contributions[number]
        off = {name: float((part - other[name]).norm()) for name, part in parts.items()}
        moved = math.sqrt(sum(value**2 for value in off.values()))
        if not moved <= tolerance.gradients * unit:
            inputs = zip(mine.inputs.get(number, []), theirs.inputs.get(number, []), strict=False)
            same = not any(_apart(one, two, tolerance) for one, two in inputs)
            same = same and len(mine.inputs.get(number, [])) == len(theirs.inputs.get(number, []))
            text = f"its clipped gradient moves by {moved / unit:.3g}·C: expected none"
            return Found("contribution", step, text, number, max(off, key=lambda name: off[name]), same, hidden)
    if math.isinf(bound):
        return None
    squares = sum(
        float((part.double() - theirs.total[name].double()).square().sum()) for name, part in mine.total.items()
    )
    moved = math.sqrt(squares)
    if not moved <= bound * (most + tolerance.gradients * max(1, len(mine.norms))):
        text = f"the sum moves by {moved / bound:.4g}·C: expected at most {most:g}·C"
        return Found("total", step, text, hidden=hidden)
    return None


def _noise(mine: StepNotes, theirs: StepNotes, tolerance: Tolerance) -> Found | None:
    for place, (one, two) in enumerate(zip(mine.releases, theirs.releases, strict=False)):
        for name, noise in one.noise.items():
            total = mine.sums[place].total if place < len(mine.sums) else {}
            size = float(noise.norm()) + float(total.get(name, torch.zeros(())).double().norm())
            off = float((noise - two.noise[name]).norm())
            if not off <= tolerance.gradients * (size + one.noise_std):
                text = (
                    f"what was added to the sum is another, by {off / max(size, 1e-300):.3g} of its size: expected the same, "
                    "since noise and divisor may not depend on who is drawn"
                )
                return Found("noise", mine.number, text, name=name)
    return None
