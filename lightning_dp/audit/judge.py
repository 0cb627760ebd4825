"""From what was observed of an audited run to bounds on ε and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_dp.accounting.epsilon import epsilon_bound
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phase import Phase, with_noise
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.tradeoff import Curve, composed
from lightning_dp.audit.bound import epsilon_lower_bound
from lightning_dp.audit.canaries import Canaries
from lightning_dp.audit.curve_bound import refutes
from lightning_dp.audit.expected import plan_p_value
from lightning_dp.audit.gaussian_pair import pair_bound
from lightning_dp.audit.guesses import Guesses, guess, planned_guesses
from lightning_dp.audit.observer import Observer
from lightning_dp.audit.plan_law import crossing, noise_factor
from lightning_dp.audit.result import CONSISTENT, VIOLATED, AuditResult, Bound
from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy

NOT_THE_PLAN = 1e-6
"""Guesses less likely than this under the plan are taken for a violation of it."""
_POINTS = 400
"""Of a claim's curve. Between them it is bounded by straight lines, which only makes a claim weaker."""
_LEAST_NOISE = 0.2


def judged(observer: Observer, canaries: Canaries, private: DifferentialPrivacy, confidence: float) -> AuditResult:
    """The verdict on a run."""
    statement, ledger = private.statement(), private.ledger
    assert ledger is not None
    runs = [
        (name, scores, members)
        for name, scores, members in (
            ("white box, gradient canaries", observer.white_box, canaries.gradient),
            ("black box, input canaries", observer.black_box, canaries.inputs),
        )
        if len(members) > 1
    ]
    each = 1.0 - (1.0 - confidence) / len(runs)  # Bonferroni: the largest of the bounds holds with ``confidence``
    attacks = tuple(
        guess(
            name,
            scores[: len(members)],
            members,
            planned_guesses(len(members), statement.epsilon, statement.delta, each),
        )
        for name, scores, members in runs
    )
    alone = _epsilon_delta(attacks, statement.delta, each)
    claim = _Claim(ledger, statement.epsilon, statement.delta)
    curve, curve_refuted = _curve(attacks, claim, 1.0 - each)
    m = len(canaries.gradient)
    seen = _Seen(observer.white_box[:m], observer.signal[:m], canaries.gradient)
    under_plan = plan_p_value(seen.scores, seen.members, ledger.plan, ledger.steps)
    unlikely = under_plan is not None and under_plan < NOT_THE_PLAN
    assert alone.epsilon is not None
    refuted = alone.epsilon > statement.epsilon or curve_refuted
    return AuditResult(
        epsilon_lower=alone.epsilon,
        confidence=confidence,
        epsilon_claimed=statement.epsilon,
        delta=statement.delta,
        bounds=(alone, curve, _pair(seen, claim, confidence), _plan_law(seen, claim, confidence)),
        plan_p_value=under_plan,
        verdict=VIOLATED if refuted or unlikely else CONSISTENT,
        attacks=attacks,
    )


@dataclass(frozen=True)
class _Claim:
    """What the run claims."""

    ledger: Ledger
    epsilon: float
    delta: float

    @property
    def phases(self) -> Sequence[Phase]:
        return self.ledger.phases

    @property
    def finite(self) -> bool:
        return math.isfinite(self.epsilon) and self.epsilon > 0

    def epsilon_with(self, factor: float) -> float:
        """ε of the plan with ``factor`` times its noise, as its accountant counts."""
        return epsilon_bound(with_noise(self.phases, factor), self.delta).epsilon

    def curve_with(self, factor: float) -> Curve:
        """The whole claim, with ``factor`` times the noise, to a thousandth of its δ.

        Raises:
            PrvFailureError: no grid holds the losses, σ below 0.2, or an accountant that simulates.
        """
        phases, slack = with_noise(self.phases, factor), self.ledger.slack(self.ledger.steps)
        if any(phase.law == "bins" for phase in phases):
            raise PrvFailureError("its accountant simulates, and has no curve")
        if min(phase.noise_multiplier for phase in phases) < _LEAST_NOISE:
            raise PrvFailureError(f"noise below {_LEAST_NOISE} says next to nothing, and a grid cannot hold it")
        return composed(phases, _POINTS, min(self.delta, 1e-6) / 1e3).but_for(slack.total_variation)


@dataclass(frozen=True)
class _Seen:
    """Of the gradient-space canaries."""

    scores: npt.NDArray[np.float64]
    signal: npt.NDArray[np.float64]
    members: npt.NDArray[np.bool_]


def _epsilon_delta(attacks: Sequence[Guesses], delta: float, each: float) -> Bound:
    """By two theorems on the same guesses: both bound the probability of so many right ones, so the larger ε counts."""

    def by_curve(found: Guesses, least: float) -> float:
        return _largest(
            lambda epsilon: refutes(1.0 - each, found.canaries, found.guesses, found.correct, Curve.of(epsilon, delta)),
            least,
        )

    bounds = [
        by_curve(one, epsilon_lower_bound(one.canaries, one.guesses, one.correct, delta, each)) for one in attacks
    ]
    return Bound(
        name="epsilon_delta",
        epsilon=max(bounds),
        supposes="the canaries' coins are fair, whatever the run does with them",
    )


def _largest(refuted: Callable[[float], bool], least: float, most: float = 60.0) -> float:
    """The largest ε that is refuted, from ``least`` on, to 1e-4."""
    if not refuted(least):
        return least
    while most - least > 1e-4:
        middle = (least + most) / 2.0
        if refuted(middle):
            least = middle
        else:
            most = middle
    return least


def _curve(attacks: Sequence[Guesses], claim: _Claim, level: float) -> tuple[Bound, bool]:
    """The bound, and whether the claim itself is refuted, for which nothing is supposed."""
    supposes = "its trade-off curve is the plan's with noise of some size, whatever else the run does"
    if not claim.finite:
        return Bound(name="curve", epsilon=None, supposes=supposes, note="the plan has no noise"), False

    def refuted(factor: float) -> bool:
        try:
            curve = claim.curve_with(factor)
        except PrvFailureError:
            if factor >= 1.0:
                raise
            return False  # so little noise that nothing is claimed
        return any(refutes(level, one.canaries, one.guesses, one.correct, curve) for one in attacks)

    try:
        factor = crossing(refuted)
    except PrvFailureError as error:
        return Bound(name="curve", epsilon=None, supposes=supposes, note=str(error)), False
    return _with_noise("curve", supposes, claim, factor), factor is not None and factor <= 1.0


def _with_noise(name: str, supposes: str, claim: _Claim, factor: float | None) -> Bound:
    """That at least ``factor`` times the plan's noise is refuted; ``None`` if none is."""
    if factor is None:
        return Bound(name=name, epsilon=0.0, supposes=supposes)
    note = f"{factor:.3g} times the plan's noise"
    return Bound(name=name, epsilon=claim.epsilon_with(factor), supposes=supposes, note=note)


def _pair(seen: _Seen, claim: _Claim, confidence: float) -> Bound:
    supposes = "what was released along the canaries, added up, is two Gaussians and independent between canaries"
    if not claim.finite or len(seen.members) < 2:
        return Bound(name="gaussian_pair", epsilon=None, supposes=supposes, note="no gradient canaries, or no noise")
    found = pair_bound(seen.signal, seen.members, claim.delta, confidence)
    looks = f"p = {found.gaussian:.2g} for being Gaussian"
    return Bound(
        name="gaussian_pair",
        epsilon=found.epsilon,
        supposes=supposes,
        note=looks if found.epsilon is None else f"{found.distance:.3f} deviations apart; {looks}",
    )


def _plan_law(seen: _Seen, claim: _Claim, confidence: float) -> Bound:
    supposes = "the run follows its plan but for the size of its noise"
    if not claim.finite or len(seen.members) < 2:
        return Bound(name="plan_law", epsilon=None, supposes=supposes, note="no gradient canaries, or no noise")
    try:
        factor = noise_factor(seen.scores, seen.members, claim.ledger.plan, claim.ledger.steps, confidence)
    except ValueError as error:
        return Bound(name="plan_law", epsilon=None, supposes=supposes, note=str(error))
    return _with_noise("plan_law", supposes, claim, factor)
