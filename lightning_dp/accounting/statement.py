"""The statement: what was guaranteed to whom, in one line for people and one object for machines."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_dp.accounting.epsilon import EpsilonBound
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phase import Phase, phase_of
from lightning_dp.accounting.risk import Risk, finite, risk_of, round_up
from lightning_dp.plan.adaptation import numbers_of
from lightning_dp.plan.clipping import ClippingStyle
from lightning_dp.plan.filtering import filter_numbers
from lightning_dp.plan.html import html_table
from lightning_dp.plan.mechanism import Mechanism, NoiseKind
from lightning_dp.plan.privacy_plan import SAMPLING
from lightning_dp.plan.sampling import SamplingScheme
from lightning_dp.version import __version__

_ACCOUNTANTS = {
    "PRV": "PRV accountant (upper bound)",
    "PLD": "PLD accountant (upper bound)",
    "MC": "Monte Carlo accountant (upper bound)",
    "RDP": "RDP accountant (upper bound)",
    "exact": "exact accounting",
}

_FLOATING = "Gaussian noise in floating point"

_ADAPTED = (
    "the clip norm is adapted from step to step by numbers that are released beside the gradient, in the one vector whose norm "
    "is bounded and that gets the noise; ε does not depend on what they are"
)
_BLOCKS: dict[SamplingScheme, str] = {
    "random_allocation": "each example is in exactly {times} of every {block} steps, drawn anew for each such block; a block "
    "that is begun counts as whole",
    "balls_in_bins": "each example is in exactly {times} of every {block} steps, the same in each such block; a block that is "
    "begun counts as whole, and n blocks as one with σ/√n",
}

_COMPOSED = "composed of "
_MOST_LISTED = 32

_KNOWN_SEED = (
    "noise and sampling were derived from a chosen seed so that the run can be repeated: whoever knows or "
    "guesses the seed can take the noise away, and the guarantee does not hold against them"
)


@dataclass(frozen=True, kw_only=True)
class Statement:
    """The guarantee of a training run, with everything needed to check it.

    ``noise_multiplier``, ``sampling_probability``, ``clip_norm``, ``clipping``, ``expected_batch_size``
    and ``dataset_size`` are those of the last phase; if training was resumed under other numbers, ``caveats``
    lists the phases.

    Args:
        epsilon: upper bound on ε after ``steps`` steps, not rounded; ``math.inf`` without noise.
        delta: δ.
        target_epsilon: the ε that training was not to exceed, or ``None``.
        accountant: ``"PRV"``, ``"PLD"``, ``"MC"``, ``"RDP"`` or ``"exact"``.
        neighbouring_relation: who is protected, and between which data sets.
        sampling: how examples are drawn.
        sampling_probability: q.
        dataset_size: N, of examples or of whatever unit ``neighbouring_relation`` names, like B.
        expected_batch_size: B.
        noise_multiplier: σ.
        noise: its kind: in floating point, or discrete, with grid and sensitivity.
        clip_norm: C, by which one example moves a step's sum of gradients at most; at first, if it is adapted.
        clipping: the clipping style, ``"flat"``, ``"per_layer"``, ``"automatic"``, ``"quantile"`` or ``"slaclip"``.
        automatic_gamma: γ of the automatic style, ``None`` with the others.
        adaptation: how C is adapted, by :data:`lightning_dp.plan.adaptation.NAMES`; ``None`` if it is fixed.
        gradient_filter: what is between release and optimizer, by :data:`lightning_dp.plan.filtering.NAMES`; ``None`` for
            nothing.
        max_batch_size: M, the size to which a larger draw is cut, or ``None``.
        steps: steps taken, resumed history included.
        randomness: ``"secret"`` or ``"reproducible"``.
        simulation: what was simulated, in words, and that its guarantee does not hold; ``None`` for a real run.
        risk: what all this means for one ``unit``; ``None`` where it was not worked out, as while a run is under way.
        unit: who is protected, ``"example"`` or another name.
        version: of this package.
        caveats: sentences without which the number should not be quoted.

    Example:
        >>> from lightning_dp.plan.privacy_plan import PrivacyPlan
        >>> plan = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000,
        ...                    expected_batch_size=100)
        >>> ledger = Ledger(plan)
        >>> ledger.charge()
        >>> print(Statement.of(ledger, randomness="secret"))  # doctest: +ELLIPSIS
        (ε = ..., δ = 1e-05)-DP, add/remove one example with N public, Poisson sampling with q = 0.1, σ = 2.0, ...
    """

    epsilon: float
    delta: float
    target_epsilon: float | None
    accountant: str
    neighbouring_relation: str
    sampling: str
    sampling_probability: float
    dataset_size: int
    expected_batch_size: float
    noise_multiplier: float
    noise: str
    clip_norm: float
    max_batch_size: int | None
    clipping: ClippingStyle
    automatic_gamma: float | None
    adaptation: dict[str, float | int] | None
    gradient_filter: dict[str, str | float] | None
    steps: int
    randomness: Literal["secret", "reproducible"]
    simulation: str | None
    risk: Risk | None
    unit: str
    version: str
    caveats: list[str]

    @classmethod
    def of(
        cls,
        ledger: Ledger,
        *,
        randomness: Literal["secret", "reproducible"],
        caveats: Sequence[str] = (),
        risk: bool = True,
        bound: EpsilonBound | None = None,
    ) -> Statement:
        """The statement for what ``ledger`` has counted so far.

        Args:
            ledger: the steps taken and the plan.
            randomness: where noise and sampling came from; ``"reproducible"`` adds a caveat.
            caveats: further sentences, put first.
            risk: whether to work out the risk, which takes some time.
            bound: on ε, of at least as many steps; that of the steps taken if ``None``.

        Raises:
            ValueError: ``randomness`` is neither of the two.
        """
        if randomness not in ("secret", "reproducible"):
            raise ValueError(f"randomness={randomness!r}: expected 'secret' or 'reproducible'.")
        plan, bound, phases = ledger.plan, ledger.epsilon() if bound is None else bound, ledger.phases
        simulation = None if plan.simulation == 1 else _simulation(ledger)
        found = [*caveats] if simulation is None else [simulation, *caveats]
        if randomness == "reproducible":
            found.append(_KNOWN_SEED)
        if phases not in ((), (phase_of(plan.mechanism, ledger.steps),)):
            found.append(f"{_COMPOSED}{_count(len(phases), 'phase')}: " + _list(phases))
        if plan.sampling in _BLOCKS and plan.mechanism.noise.correlation is None:
            block, times = plan.mechanism.sampling.block, plan.mechanism.sampling.participations
            counted = "" if times == 1 else f", and counts as {times} blocks of {block // times} steps with one each"
            found.append(_BLOCKS[plan.sampling].format(block=block, times="one" if times == 1 else times) + counted)
        if plan.clipping_rule.adaptation is not None:
            found.append(_ADAPTED)
        found.extend(_how_accounted(ledger))
        found.extend(ledger.notes)
        if bound.note is not None:
            found.append(bound.note)
        return cls(
            epsilon=bound.epsilon,
            delta=plan.delta,
            target_epsilon=plan.target_epsilon,
            accountant=bound.accountant,
            neighbouring_relation=plan.neighbouring_relation,
            sampling=("" if plan.max_batch_size is None else "truncated ") + SAMPLING[plan.sampling],
            sampling_probability=plan.sampling_probability,
            dataset_size=plan.dataset_size,
            expected_batch_size=plan.expected_batch_size,
            noise_multiplier=plan.noise_multiplier,
            noise=_IN_WORDS[plan.mechanism.noise.kind](plan.mechanism),
            clip_norm=plan.clip_norm,
            max_batch_size=plan.max_batch_size,
            clipping=plan.clipping,
            automatic_gamma=plan.automatic_gamma if plan.clipping == "automatic" else None,
            adaptation=_adaptation(plan.mechanism),
            gradient_filter=None if plan.mechanism.filter is None else filter_numbers(plan.mechanism.filter),
            steps=ledger.steps,
            randomness=randomness,
            simulation=simulation,
            risk=risk_of(phases, ledger.slack(ledger.steps).total_variation) if risk else None,
            unit=plan.unit,
            version=__version__,
            caveats=list(dict.fromkeys(found)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for strict JSON: an infinite ε or C, which JSON lacks, is ``"inf"``."""
        found: dict[str, Any] = finite(asdict(self))
        return found

    def to_json(self) -> str:
        """:meth:`to_dict` as indented JSON that every parser reads."""
        return json.dumps(self.to_dict(), allow_nan=False, ensure_ascii=False, indent=2)

    @property
    def in_words(self) -> str:
        """The risk in one sentence; empty where it was not worked out, or where there is no guarantee."""
        if self.risk is None or self.simulation is not None:
            return ""
        known = "" if self.randomness == "secret" else ", unless they know the seed"
        return self.risk.sentence(self.unit) + known

    def _repr_html_(self) -> str:
        """For notebooks: the statement, its numbers in a table, and below it what must be said with them."""
        last = " in the last phase" if any(caveat.startswith(_COMPOSED) for caveat in self.caveats) else ""
        rows = {
            "ε spent, an upper bound": round_up(self.epsilon),
            "δ": self.delta,
            "budget ε": self.target_epsilon,
            "steps": self.steps,
            "protects": self.neighbouring_relation,
            "risk": self.in_words or None,
            f"noise multiplier σ{last}": self.noise_multiplier,
            "noise": self.noise,
            f"clip norm C{last}": self.clip_norm,
            "clipping": self.clipping,
            "sampling": self.sampling,
            f"sampling probability q{last}": self.sampling_probability,
            f"expected batch size B{last}": self.expected_batch_size,
            f"dataset size N{last}": self.dataset_size,
            "at most, in a step": self.max_batch_size,
            "randomness": self.randomness,
            "accountant": _ACCOUNTANTS[self.accountant],
        }
        return html_table(str(self), rows, self.caveats)

    def __str__(self) -> str:
        composed = next((caveat for caveat in self.caveats if caveat.startswith(_COMPOSED)), None)
        mechanism = (
            f", {composed}"
            if composed
            else f" with q = {_plain(self.sampling_probability)}, σ = {_plain(self.noise_multiplier)}"
        )
        style = "" if self.clipping == "flat" else f" ({self.clipping.replace('_', ' ')} clipping)"
        style = style if self.adaptation is None else f" at first{style}"
        seed = ", from a known seed" if self.randomness == "reproducible" else ""
        filtered = (
            ""
            if self.gradient_filter is None
            else ", filtered before the optimizer ({})".format(
                ", ".join(f"{name}={value}" for name, value in self.gradient_filter.items())
            )
        )
        noise = "" if self.noise == _FLOATING else f", {self.noise}"
        bound = "" if self.max_batch_size is None else f", at most {self.max_batch_size} examples a step"
        claim = "" if self.simulation is None else f"{self.simulation}. What was run is "
        return (
            f"{claim}(ε = {round_up(self.epsilon)}, δ = {self.delta:g})-DP, {self.neighbouring_relation}, "
            f"{self.sampling} sampling{mechanism}{bound}, C = {_plain(self.clip_norm)}{style}, "
            f"{_count(self.steps, 'step')}{seed}{noise}{filtered}, {_ACCOUNTANTS[self.accountant]}"
        )


def _simulation(ledger: Ledger) -> str:
    plan = ledger.plan
    return (
        f"SIMULATION, NOT PRIVATE as the run it stands for: {_count(ledger.steps, 'step')} at 1/{plan.simulation} of the batch "
        f"and the noise of a run with q = {_plain(plan.sampling_probability * plan.simulation)}, "
        f"σ = {_plain(plan.noise_multiplier * plan.simulation)}, whose ε must not be quoted for this one"
    )


def _adaptation(mechanism: Mechanism) -> dict[str, float | int] | None:
    numbers = numbers_of(mechanism.clipping.adaptation)
    return {name: value for name, value in numbers.items() if value is not None} or None


def _floating(mechanism: Mechanism) -> str:
    correlation = mechanism.noise.correlation
    if correlation is None:
        return _FLOATING
    of = "the inverse of " if correlation.of_inverse else ""
    bands = f"{of}its strategy matrix has {_count(correlation.bands, 'band')}"
    return f"{_FLOATING}, correlated over the steps ({correlation.style}: {bands})"


def _discrete(mechanism: Mechanism) -> str:
    norm, units = mechanism.sensitivity, mechanism.noise.resolution or 1
    if mechanism.clipping.adaptation is not None:  # the grid is as fine as C is small
        return f"discrete Gaussian noise (sensitivity = {units} units of a grid)"
    return f"discrete Gaussian noise (grid {norm / units:.3g}, sensitivity {_plain(norm)} = {units} units)"


_IN_WORDS: dict[NoiseKind, Callable[[Mechanism], str]] = {"floating": _floating, "discrete": _discrete}


def _how_accounted(ledger: Ledger) -> list[str]:
    """What the accountant composes for the steps of the current mechanism, where it is not the steps themselves."""
    mechanism, steps = ledger.plan.mechanism, ledger.steps - ledger.begun_at
    correlation, phase = mechanism.noise.correlation, phase_of(mechanism, steps)
    if correlation is None:
        return []
    if plan_of_bins := _bins(mechanism, phase):
        return [plan_of_bins]
    turns = f"an example takes part in at most one of {_count(mechanism.groups, 'step')}"
    if correlation.of_inverse:
        return [
            f"noise is correlated over the steps: {turns}, and all its turns are accounted for as one Gaussian mechanism with "
            f"σ = {_plain(phase.noise_multiplier)}, whoever is drawn"
        ]
    return [
        f"noise is correlated over the steps: {turns}, and its turns are accounted for as {_count(phase.steps, 'step')} of "
        f"the Poisson-subsampled Gaussian mechanism with q = {_plain(phase.sampling_probability)}"
    ]


def _bins(mechanism: Mechanism, phase: Phase) -> str | None:
    block = mechanism.sampling.block
    if mechanism.sampling.scheme not in _BLOCKS:
        return None
    return (
        f"noise is correlated over the steps, and each example is in exactly one of every {_count(block, 'step')}, the same in "
        f"each such block: {_count(phase.blocks, 'block')} are accounted for together, and one that is begun counts as whole"
    )


def _list(phases: Sequence[Phase]) -> str:
    more = f"; and {len(phases) - _MOST_LISTED} more" if len(phases) > _MOST_LISTED else ""
    return "; ".join(map(_describe, phases[:_MOST_LISTED])) + more


def _describe(phase: Phase) -> str:
    what = {"poisson": "step", "allocation": "block", "bins": f"stretch of {phase.blocks} blocks"}[phase.law]
    return (
        f"{_count(phase.steps, what)} with q = {_plain(phase.sampling_probability)}, "
        f"σ = {_plain(phase.noise_multiplier)}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _plain(value: float) -> str:
    return "∞" if math.isinf(value) else str(float(f"{value:.6g}"))
