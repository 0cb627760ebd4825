"""One stretch of a ledger: consecutive steps under one set of public numbers, written to and read from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.slack import Distance, distance_of_step
from lightning_dp.plan.clipping import DEFAULT_GAMMA, ClippingStyle, check_clipping
from lightning_dp.plan.privacy_plan import (
    EXAMPLE,
    MOST_EXAMPLES,
    PrivacyPlan,
    check_clip_norm,
    check_delta,
    check_max_batch_size,
)
from lightning_dp.validate import number, shown, whole

_NULLABLE = ("max_batch_size", "resolution", "coordinates")
REMEDY = "Resume from a checkpoint written by this version, whole and unedited; spent budget cannot be guessed."


@dataclass(frozen=True, slots=True)
class Entry:
    """Consecutive steps under one set of public numbers."""

    steps: int
    noise_multiplier: float
    sampling_probability: float
    clip_norm: float
    expected_batch_size: float
    dataset_size: int
    delta: float
    max_batch_size: int | None
    resolution: int | None
    coordinates: int | None
    clipping: ClippingStyle = "flat"
    unit: str = EXAMPLE

    @classmethod
    def of(cls, plan: PrivacyPlan, steps: int) -> Entry:
        """``steps`` steps of ``plan``."""
        return cls(
            steps=steps,
            noise_multiplier=float(plan.noise_multiplier),
            sampling_probability=float(plan.sampling_probability),
            clip_norm=float(plan.clip_norm),
            expected_batch_size=float(plan.expected_batch_size),
            dataset_size=int(plan.dataset_size),
            delta=float(plan.delta),
            max_batch_size=plan.max_batch_size,
            resolution=plan.resolution,
            coordinates=plan.coordinates,
            clipping=plan.clipping,
            unit=plan.unit,
        )

    @classmethod
    def read(cls, raw: object) -> Entry:
        """An entry from its dict of plain values.

        Raises:
            ValueError: a field is missing, of another type or out of range.
        """
        fields = cls.__dataclass_fields__
        if isinstance(raw, Mapping):
            raw = {"clipping": "flat", "unit": EXAMPLE, **raw}  # all that there was at first
        if not isinstance(raw, Mapping) or set(raw) != set(fields):
            found = sorted(map(str, raw)) if isinstance(raw, Mapping) else raw
            raise ValueError(
                f"a phase of the ledger's state has {shown(found, 400)}: expected {sorted(fields)}. {REMEDY}"
            )
        for name in set(fields) - {"clipping", "unit"}:
            if raw[name] is None and name in _NULLABLE:
                continue
            kinds = (int,) if name in ("steps", "dataset_size", *_NULLABLE) else (int, float)
            if not isinstance(raw[name], kinds) or isinstance(raw[name], bool):
                raise ValueError(f"{name}={shown(raw[name])} in the ledger's state: expected a plain number. {REMEDY}")
        if not isinstance(raw["unit"], str):
            raise ValueError(
                f"unit={shown(raw['unit'])} in the ledger's state: expected the name of a privacy unit. {REMEDY}"
            )
        entry = cls(**{str(name): value for name, value in raw.items()})
        try:
            entry.phase()
            check_clip_norm(entry.clip_norm)
            check_clipping(entry.clipping, DEFAULT_GAMMA, entry.clip_norm)
            check_delta(entry.delta)
            entry.check_draw()
            entry.check_distance()
        except ValueError as error:
            raise ValueError(f"the ledger's state is not valid: {error} {REMEDY}") from error
        return entry

    def phase(self) -> Phase:
        """What the accountant composes."""
        return Phase(self.noise_multiplier, self.sampling_probability, self.steps)

    def distance(self) -> Distance:
        """How far these steps are from what the accountant composes, all together."""
        one = distance_of_step(
            dataset_size=self.dataset_size,
            sampling_probability=self.sampling_probability,
            noise_multiplier=self.noise_multiplier,
            max_batch_size=self.max_batch_size,
            resolution=self.resolution,
            coordinates=self.coordinates,
        )
        return one * self.steps

    def check_draw(self) -> None:
        """Raise ``ValueError`` unless q is B / N, which nobody writes any other way."""
        whole("dataset_size", self.dataset_size, 1, MOST_EXAMPLES)
        q = number("expected_batch_size", self.expected_batch_size) / self.dataset_size
        if not math.isclose(q, self.sampling_probability, rel_tol=1e-9):
            raise ValueError(
                f"sampling_probability={self.sampling_probability} with expected_batch_size={self.expected_batch_size} and "
                f"dataset_size={self.dataset_size}: expected their ratio."
            )

    def check_distance(self) -> None:
        """Raise ``ValueError`` unless the numbers that the distance is computed from make sense."""
        if self.max_batch_size is not None:
            check_max_batch_size(self.max_batch_size)
        for name, value in (("dataset_size", self.dataset_size), ("resolution", self.resolution)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        if self.resolution is not None and (self.coordinates is None or self.coordinates < 1):
            raise ValueError(f"coordinates={self.coordinates}: expected at least 1 beside a resolution.")
        self.distance()


def check_one_unit(entries: Iterable[Entry], unit: str) -> None:
    """Refuse to go on with another privacy unit than that of the steps before.

    Raises:
        ValueError: see the message.
    """
    other = next((entry.unit for entry in entries if entry.unit != unit), None)
    if other is not None:
        raise ValueError(
            f"privacy_unit={unit!r} after steps with {shown(other)}: expected the same throughout. The steps before protect one "
            f"{other} each, and no later step changes that. Go on with that unit, or start anew."
        )


def merge_entries(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Join neighbouring entries that differ in nothing but their steps, and leave out those without steps."""
    merged: list[Entry] = []
    for entry in entries:
        if entry.steps == 0:
            continue
        if merged and replace(merged[-1], steps=entry.steps) == entry:
            merged[-1] = replace(entry, steps=merged[-1].steps + entry.steps)
        else:
            merged.append(entry)
    return tuple(merged)
