"""The ledger's line: consecutive steps of one mechanism, written to and read from checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from secrets import token_hex
from typing import Any

from lightning_dp.accounting.assumptions import NAMES, NOTHING_ASSUMED, Assumptions
from lightning_dp.accounting.phase import Phase, phase_of
from lightning_dp.accounting.slack import Slack, slack_of
from lightning_dp.plan.adaptation import NAMES as ADAPTED
from lightning_dp.plan.adaptation import numbers_of
from lightning_dp.plan.clipping import DEFAULT_GAMMA
from lightning_dp.plan.correlation import INDEPENDENT
from lightning_dp.plan.filtering import NAMES as FILTERED
from lightning_dp.plan.filtering import filter_numbers
from lightning_dp.plan.mechanism import ADD_REMOVE, EXAMPLE, Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan, check_delta
from lightning_dp.validate import number, shown

REMEDY = "Resume from a checkpoint written by this version, whole and unedited; spent budget cannot be guessed."
FIELDS = (
    "steps", "noise_multiplier", "sampling_probability", "clip_norm", "expected_batch_size", "dataset_size", "delta",
    "max_batch_size", "resolution", "coordinates", "clipping", "automatic_gamma", *ADAPTED, "unit", "row_wise", "public_state",
    "sampling", "stretch", "noise", *FILTERED, "participations", "adjacency", "sizes",
)  # fmt: skip
"""What is written of an entry."""

_NULLABLE = ("max_batch_size", "resolution", "coordinates", "automatic_gamma", *ADAPTED, *FILTERED)
_BESIDE = ("automatic_gamma", "stretch", *NAMES)
_SINCE = {
    "sampling": "poisson", "participations": 1, "noise": INDEPENDENT, "adjacency": ADD_REMOVE,
    **dict.fromkeys((*ADAPTED, *FILTERED)),
}  # fmt: skip
"""What a mechanism has since later versions, as it was before. In :meth:`Entry.text` only where it is another."""
_COUNTS = ("steps", "dataset_size", "max_batch_size", "resolution", "coordinates", "slack_bins", "participations")
_TEXTS = ("clipping", "unit", "sampling", "stretch", "noise", "gradient_filter", "adjacency")
_AT_FIRST = {
    "clipping": "flat", "unit": EXAMPLE, "automatic_gamma": None, "stretch": "", **_SINCE, **NOTHING_ASSUMED.numbers,
}  # fmt: skip
"""What was not written by versions that knew nothing else, or did not write it down."""
_LONGEST = 100


@dataclass(frozen=True, slots=True)
class Entry:
    """Consecutive steps of one mechanism.

    Args:
        mechanism: what each of them was, whole. Without automatic clipping γ means nothing, and is the default.
        steps: how many.
        delta: δ of the statement that was meant to be made.
        gamma_known: whether γ was written down. At first ledgers wrote none; ``mechanism`` then has the default.
        assumed: what the user vouched for while they were taken. ε does not depend on it, and the statement lists it.
        stretch: names the randomness that they share, if the mechanism is not memoryless: steps of one mechanism and one
            stretch are accounted for together, and a resume begins another. Empty for a memoryless mechanism.
    """

    mechanism: Mechanism
    steps: int
    delta: float
    gamma_known: bool = True
    assumed: Assumptions = NOTHING_ASSUMED
    stretch: str = ""

    @classmethod
    def of(cls, plan: PrivacyPlan, steps: int) -> Entry:
        """``steps`` steps of ``plan``."""
        mechanism = plan.mechanism
        if mechanism.clipping.style != "automatic":
            mechanism = mechanism.but(automatic_gamma=DEFAULT_GAMMA)
        return cls(mechanism, steps, float(plan.delta))

    @classmethod
    def read(cls, raw: object) -> Entry:
        """An entry from its dict of plain values.

        Raises:
            ValueError: a field is missing, of another type or out of range.
        """
        if isinstance(raw, Mapping):
            raw = {**_AT_FIRST, **raw}
        if not isinstance(raw, Mapping) or set(raw) != set(FIELDS):
            found = sorted(map(str, raw)) if isinstance(raw, Mapping) else raw
            raise ValueError(
                f"a phase of the ledger's state has {shown(found, 800)}: expected {sorted(FIELDS)}. {REMEDY}"
            )
        for name in FIELDS:
            if name in (*_TEXTS, *NAMES) or (raw[name] is None and name in _NULLABLE):
                continue
            kinds = (int,) if name in _COUNTS else (int, float)
            if not isinstance(raw[name], kinds) or isinstance(raw[name], bool):
                raise ValueError(f"{name}={shown(raw[name])} in the ledger's state: expected a plain number. {REMEDY}")
        if not isinstance(raw["unit"], str):
            raise ValueError(
                f"unit={shown(raw['unit'])} in the ledger's state: expected the name of a privacy unit. {REMEDY}"
            )
        if not isinstance(raw["stretch"], str) or len(raw["stretch"]) > _LONGEST:
            raise ValueError(f"stretch={shown(raw['stretch'])} in the ledger's state: expected a name. {REMEDY}")
        try:
            return cls._checked(dict(raw))
        except ValueError as error:
            raise ValueError(f"the ledger's state is not valid: {error} {REMEDY}") from error

    @classmethod
    def _checked(cls, raw: dict[str, Any]) -> Entry:
        steps, delta, q, gamma = (
            raw.pop(name) for name in ("steps", "delta", "sampling_probability", "automatic_gamma")
        )
        assumed, stretch = Assumptions.read({name: raw.pop(name) for name in NAMES}), raw.pop("stretch")
        automatic = raw["clipping"] == "automatic"
        if gamma is not None and not automatic:
            raise ValueError(f"automatic_gamma={gamma} with clipping={shown(raw['clipping'])}: expected None.")
        mechanism = Mechanism.of(**raw, automatic_gamma=DEFAULT_GAMMA if gamma is None else gamma)
        if not math.isclose(mechanism.sampling.probability, number("sampling_probability", q), rel_tol=1e-9):
            raise ValueError(
                f"sampling_probability={q} with expected_batch_size={raw['expected_batch_size']} and "
                f"dataset_size={raw['dataset_size']}: expected their ratio."
            )
        check_delta(delta)
        if mechanism.memoryless != (stretch == ""):
            raise ValueError(
                f"stretch={shown(stretch)} with sampling={raw['sampling']!r}: expected a name exactly where steps are "
                "accounted for together."
            )
        known = gamma is not None or not automatic
        entry = cls(mechanism, steps, delta, gamma_known=known, assumed=assumed, stretch=stretch)
        entry.phase()
        entry.slack()
        return entry

    @property
    def numbers(self) -> dict[str, Any]:
        """As plain values, for checkpoints and journals; :meth:`read` is the inverse."""
        step = self.mechanism
        return {
            "steps": self.steps,
            "noise_multiplier": float(step.noise.noise_multiplier),
            "sampling_probability": float(step.sampling.probability),
            "clip_norm": float(step.clipping.clip_norm),
            "expected_batch_size": float(step.sampling.expected_batch_size),
            "dataset_size": int(step.sampling.dataset_size),
            "delta": self.delta,
            "max_batch_size": step.sampling.max_batch_size,
            "resolution": step.noise.resolution,
            "coordinates": step.noise.coordinates,
            "clipping": step.clipping.style,
            "automatic_gamma": self.gamma,
            **numbers_of(step.clipping.adaptation),
            "unit": step.unit,
            "sampling": step.sampling.scheme,
            "participations": step.sampling.participations,
            "stretch": self.stretch,
            "noise": str(step.noise.correlation or INDEPENDENT),
            **filter_numbers(step.filter),
            "adjacency": step.adjacency,
            **self.assumed.numbers,
        }

    @property
    def gamma(self) -> float | None:
        """γ of automatic clipping; ``None`` with another style, or if it was not written down."""
        automatic = self.mechanism.clipping.style == "automatic"
        return self.mechanism.clipping.gamma if automatic and self.gamma_known else None

    def text(self) -> str:
        """The numbers of one of these steps as they enter the key of a run with a known seed.

        The form does not change between versions, so that the continuation of a checkpoint can be repeated. γ and what is
        vouched for enter the key beside it (:func:`lightning_dp.record.course.facts_of`).
        """
        shown_numbers = {
            name: value
            for name, value in self.numbers.items()
            if name not in _BESIDE and not (name in _SINCE and value == _SINCE[name])
        }
        return f"Entry({', '.join(f'{name}={value!r}' for name, value in {**shown_numbers, 'steps': 0}.items())})"

    def phase(self) -> Phase:
        """What the accountants compose, if these are all the steps of their stretch; see :func:`phases_composed`."""
        return phase_of(self.mechanism, self.steps)

    def slack(self) -> Slack:
        """How far these steps are from what the accountant composes, all together."""
        return slack_of(self.mechanism) * self.steps


def phases_composed(entries: Iterable[Entry]) -> tuple[Phase, ...]:
    """What the accountants compose for all of ``entries``: steps that share their randomness make one phase."""
    together: dict[object, tuple[Mechanism, int]] = {}
    for place, entry in enumerate(entries):
        key = (entry.stretch, entry.mechanism) if entry.stretch else place
        together[key] = (entry.mechanism, together.get(key, (entry.mechanism, 0))[1] + entry.steps)
    return tuple(phase_of(mechanism, steps) for mechanism, steps in together.values())


def fresh_stretch() -> str:
    """A name for randomness that begins anew; no two are the same."""
    return token_hex(8)


def check_one_relation(entries: Iterable[Entry], unit: str, adjacency: str) -> None:
    """Refuse to go on with another privacy unit, or between other data sets, than in the steps before.

    Raises:
        ValueError: see the message.
    """
    steps = [entry.mechanism for entry in entries]
    before = next((step.adjacency for step in steps if step.adjacency != adjacency), None)
    if before is not None:
        raise ValueError(
            f"adjacency={adjacency!r} after steps with {before!r}: expected the same throughout, since the statement names one "
            "relation for all steps. Go on with that, or start anew."
        )
    other = next((step.unit for step in steps if step.unit != unit), None)
    if other is not None:
        raise ValueError(
            f"privacy_unit={unit!r} after steps with {shown(other)}: expected the same throughout. The steps before protect "
            f"one {other} each, and no later step changes that. Go on with that unit, or start anew."
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
