"""ε as an upper bound at every step, for add/remove-one neighbours."""

from __future__ import annotations

import bisect
import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from scipy.special import log_ndtr, ndtr

from lightning_dp.accounting.mixture import FAILURE, can_simulate, simulated_bound
from lightning_dp.accounting.phase import Phase, Seldom, as_known
from lightning_dp.accounting.pld import pld_bound, pld_bounds
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.rdp import rdp_epsilon, steps_within
from lightning_dp.plan.privacy_plan import check_delta

__all__ = [
    "EpsilonBound",
    "EpsilonCurve",
    "Phase",
    "epsilon_bound",
    "gaussian_epsilon",
    "rdp_epsilon",
]

_SIMULATED = (
    "ε is an upper bound found by simulation with a public seed: that it is too small for some plan has a probability of at "
    f"most {FAILURE:g} δ over the choice of the seed, which is a part of the δ that is stated"
)
_FEW_SAMPLES = 1 / 200
"""Of more bins so few outcomes are simulated that distributions may tell more."""
_NO_NOISE = "a step without noise was taken: nobody is protected"
MOST_MECHANISMS = 64
"""Phases of different σ or q that are composed one by one; of more than these, neighbours are put together."""


@dataclass(frozen=True, slots=True)
class EpsilonBound:
    """An upper bound on ε, never an estimate.

    Args:
        epsilon: the bound; ``math.inf`` if a step had no noise.
        accountant: ``"PRV"`` (privacy random variables), ``"PLD"`` (privacy loss distributions), ``"MC"`` (Monte Carlo),
            ``"RDP"`` (Rényi) or ``"exact"`` (no steps, no noise, or the Gaussian mechanism without subsampling).
        note: what a reader should know about how the bound was obtained, or ``None``.
    """

    epsilon: float
    accountant: str
    note: str | None = None


def epsilon_bound(phases: Sequence[Phase], delta: float) -> EpsilonBound:
    """Upper bound on ε of all ``phases`` composed.

    The guarantee is for add/remove-one neighbours with Poisson sampling. Both directions (the example is
    added, the example is removed) are composed separately and the larger ε is given, because the subsampled
    Gaussian's two directions differ, and that one of them always is the larger is proven for one step only.

    | case | answer |
    |---|---|
    | no steps | 0, exact |
    | a step with σ = 0 | ``math.inf``, exact |
    | q = 1 throughout | the Gaussian mechanism's own ε, exact |
    | otherwise | privacy random variables on a grid, each discretised so that it dominates: an upper bound |
    | a block of an allocation among them | likewise, by the likelihood ratios of a block |
    | balls in bins under correlated noise | an upper bound by simulation; with other sampling beside it, by distributions |
    | no grid holds the losses | the RDP upper bound, with the reason in ``note`` |

    The composition is that of mechanisms fixed in advance: σ and q may change between phases, but should not
    be chosen by looking at what earlier phases released.

    Args:
        phases: runs of identical steps; their order does not matter.
        delta: δ, in (0, 1).

    Raises:
        ValueError: ``delta`` is outside (0, 1).

    Example:
        >>> bound = epsilon_bound([Phase(3.0, 4096 / 50000, 875)], delta=1e-5)
        >>> bound.accountant, round(bound.epsilon, 2)
        ('PRV', 3.6)

    Source: Gopi, Lee and Wutschitz (2021), "Numerical composition of differential privacy", for privacy random variables and
    their composition, with :mod:`lightning_dp.accounting.likelihood_ratio` in place of their error bound; Zhu, Dong and Wang
    (2022), Theorem 11, for the pair of directions; Balle and Wang (2018), Theorem 8, for q = 1.
    """
    check_delta(delta)
    pooled = pool(phases)
    bound = _bound_of(few(pooled), delta)
    return bound if len(pooled) <= MOST_MECHANISMS else replace(bound, note=_together(bound.note, len(pooled)))


@lru_cache(maxsize=256)
def _bound_of(phases: tuple[Phase, ...], delta: float) -> EpsilonBound:
    if not phases:
        return EpsilonBound(0.0, "exact")
    if any(phase.noise_multiplier == 0 for phase in phases):
        return EpsilonBound(math.inf, "exact", _NO_NOISE)
    if can_simulate(phases) and not any(phase.seldom for phase in phases):
        return _by_simulation(phases, delta)
    poisson = all(phase.law == "poisson" for phase in phases)
    if poisson and all(phase.sampling_probability == 1 and phase.seldom is None for phase in phases):
        return EpsilonBound(gaussian_epsilon(phases, delta), "exact")
    try:
        by_pld = pld_bound(phases, delta)
    except PrvFailureError as failure:
        return EpsilonBound(rdp_epsilon(phases, delta), "RDP", f"ε is an RDP (Rényi) upper bound, because {failure}")
    if poisson:
        return EpsilonBound(by_pld, "PRV")
    by_rdp = rdp_epsilon(phases, delta)
    return EpsilonBound(by_pld, "PLD") if by_pld <= by_rdp else EpsilonBound(by_rdp, "RDP")


def _by_simulation(phases: tuple[Phase, ...], delta: float) -> EpsilonBound:
    known = gaussian_epsilon(map(as_known, phases), delta)
    if known == 0.0:
        return EpsilonBound(0.0, "exact")
    removed, added = simulated_bound(phases, delta, known)
    if added > removed or any(phase.sampling_probability < _FEW_SAMPLES for phase in phases):
        with contextlib.suppress(PrvFailureError):  # else what was simulated has to do
            removed, added = map(min, (removed, added), pld_bounds(phases, delta))
    return EpsilonBound(max(removed, added), "MC", _SIMULATED)


def gaussian_epsilon(phases: Iterable[Phase], delta: float) -> float:
    """ε of the Gaussian mechanism composed over ``phases``, every one of which has q = 1 and σ > 0.

    Composition of Gaussian mechanisms is one Gaussian mechanism with σ⁻² = Σ steps / σᵢ² (Dong, Roth and Su
    2022, Corollary 3.3), whose δ(ε) has a closed form (Balle and Wang 2018, Theorem 8). Rounded up by one
    part in 1e9.

    Example:
        >>> round(gaussian_epsilon([Phase(1.0, 1.0, 1)], delta=1e-5), 2)
        4.38
    """
    mu = math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in phases))
    if float(ndtr(mu / 2.0)) - float(ndtr(-mu / 2.0)) <= delta:
        return 0.0

    def excess(epsilon: float) -> float:
        log_p = float(log_ndtr(mu / 2.0 - epsilon / mu))
        log_ratio = min(0.0, epsilon + float(log_ndtr(-mu / 2.0 - epsilon / mu)) - log_p)
        log_one_minus_ratio = math.log(-math.expm1(log_ratio)) if log_ratio < 0.0 else -math.inf
        return max(log_p + log_one_minus_ratio - math.log(delta), -1e6)

    ceiling = mu**2 / 2.0 + mu * math.sqrt(2.0 * math.log(1.0 / delta)) + 1e-12
    if excess(ceiling) >= 0.0:  # only by rounding: the Chernoff bound of the Gaussian tail is a bound
        return ceiling * (1.0 + 1e-9)
    from scipy.optimize import brentq  # slow to import, and seldom needed

    root = float(brentq(excess, 0.0, ceiling, xtol=1e-13, rtol=1e-12))
    return root * (1.0 + 1e-9) + 1e-12


class EpsilonCurve:
    """Upper bounds on ε after ``history`` and any number of further steps, which never fall as steps grow.

    ε itself does not fall, so a bound may be raised to that of fewer steps, and lowered to that of more. Each repeated query
    costs a look-up.

    Args:
        history: phases already spent.
        noise_multiplier: σ of the steps to come.
        sampling_probability: q of the steps to come.
        delta: δ, in (0, 1).
        seldom: what a step to come is now and then instead.

    Raises:
        ValueError: a number is outside its range.

    Example:
        >>> curve = EpsilonCurve((), 3.0, sampling_probability=0.08192, delta=1e-5)
        >>> curve.at(0).epsilon, curve.at(100).epsilon < curve.at(875).epsilon
        (0.0, True)
    """

    def __init__(
        self,
        history: Sequence[Phase],
        noise_multiplier: float,
        sampling_probability: float,
        delta: float,
        seldom: Seldom | None = None,
    ) -> None:
        check_delta(delta)
        self._each, self._delta = Phase(noise_multiplier, sampling_probability, 0, seldom=seldom), delta
        pooled = pool(history)
        self._put_together = len(pooled) if len(pooled) > MOST_MECHANISMS else 0
        self._history = few(pooled)
        self._known: dict[int, EpsilonBound] = {}
        self._known_steps: list[int] = []

    def at(self, steps: int) -> EpsilonBound:
        """The bound after the history followed by ``steps`` steps.

        Raises:
            ValueError: ``steps`` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}: expected a non-negative number of steps after the history.")
        if steps not in self._known:
            fresh = epsilon_bound([*self._history, replace(self._each, steps=steps)], self._delta)
            bound = self._between_neighbours(steps, fresh)
            if self._put_together:
                bound = replace(bound, note=_together(bound.note, self._put_together))
            self._known[steps] = bound
            bisect.insort(self._known_steps, steps)
        return self._known[steps]

    def rdp_steps(self, epsilon: float) -> float:
        """A number of further steps that surely stays within ``epsilon``, by RDP alone (possibly ``inf``)."""
        return max(0.0, steps_within(self._history, self._each, self._delta, epsilon))

    def _between_neighbours(self, steps: int, bound: EpsilonBound) -> EpsilonBound:
        place = bisect.bisect_left(self._known_steps, steps)
        if place > 0:
            fewer = self._known[self._known_steps[place - 1]]
            bound = fewer if fewer.epsilon > bound.epsilon else bound
        if place < len(self._known_steps):
            more = self._known[self._known_steps[place]]
            bound = more if more.epsilon < bound.epsilon else bound
        return bound


def pool(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Add up the steps of equal mechanisms: composition does not depend on the order."""
    steps: dict[Phase, int] = {}
    for phase in phases:
        if phase.steps:
            alike = replace(phase, steps=0)
            steps[alike] = steps.get(alike, 0) + phase.steps
    return tuple(replace(alike, steps=count) for alike, count in steps.items())


def few(pooled: tuple[Phase, ...], most: int = MOST_MECHANISMS) -> tuple[Phase, ...]:
    """At most ``most`` phases that lose no less privacy than the given ones, so that work is bounded.

    Phases next to each other in σ are put together with the smallest σ and the largest q among them. Less noise only adds
    to the loss (the noise that is missing could be added afterwards), and so does a larger q (a sample of probability
    q' < q is a sample of one of probability q, and convexity of the hockey-stick divergence does the rest). So does a shorter
    block: one step of k is one of k' < k that were drawn among the k first.

    Example:
        >>> len(few(tuple(Phase(1.0 + i / 1000, 0.1, 1) for i in range(3000)))) <= MOST_MECHANISMS
        True
    """
    if len(pooled) <= most:
        return pooled
    if any(phase.law == "bins" for phase in pooled):
        return few(pool(as_known(phase) if phase.law == "bins" else phase for phase in pooled), most)
    laws = dict.fromkeys(phase.law for phase in pooled)
    if len(laws) > 1:
        return tuple(
            one for law in laws for one in few(tuple(phase for phase in pooled if phase.law == law), most // len(laws))
        )
    ordered = sorted(pooled, key=lambda phase: (phase.noise_multiplier, phase.sampling_probability))
    size = math.ceil(len(ordered) / most)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return pool(
        Phase(
            min(phase.noise_multiplier for phase in group),
            max(phase.sampling_probability for phase in group),
            sum(phase.steps for phase in group),
            group[0].law,
            seldom=_least_private([phase.seldom for phase in group if phase.seldom], group),
        )
        for group in groups
    )


def _least_private(seldom: Sequence[Seldom], group: Sequence[Phase]) -> Seldom | None:
    """What is no better than any of these nor than the phases themselves, as often as the most frequent."""
    if not seldom:
        return None
    return Seldom(
        max(one.probability for one in seldom),
        min(min(one.noise_multiplier for one in seldom), min(phase.noise_multiplier for phase in group)),
        max(max(one.sampling_probability for one in seldom), max(phase.sampling_probability for phase in group)),
    )


def _together(note: str | None, number: int) -> str:
    said = (
        f"{number} phases of other numbers were put together, each with more noise than it is accounted for, to bound ε in "
        "time"
    )
    return said if note is None or note == said else f"{note}; {said}" if said not in note else note
