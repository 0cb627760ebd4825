"""Finding the noise multiplier that spends a given ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Decimal

from scipy.special import log_ndtr, ndtr

from lightning_dp.accounting.epsilon import MOST_MECHANISMS, epsilon_bound, few, pool
from lightning_dp.accounting.mixture import can_simulate, closed_bound
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.rdp import rdp_epsilon
from lightning_dp.accounting.target import RiskTarget
from lightning_dp.plan.privacy_plan import MOST_STEPS, check_delta, check_epsilon
from lightning_dp.plan.sampling import block_of, check_sampling_probability
from lightning_dp.validate import whole

LARGEST_NOISE_MULTIPLIER = 1e6
"""The search gives up beyond this σ."""

_SMALLEST_NOISE_MULTIPLIER = 1e-3
_TOLERANCE = 5e-4


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    sampling_probability: float,
    steps: int,
    history: Sequence[Phase] = (),
) -> float:
    """The smallest σ, to one part in a thousand, with which ``steps`` more steps stay within ``epsilon``.

    The σ returned was itself confirmed: ``epsilon_bound([*history, Phase(σ, q, steps)], delta)`` is at most
    ``epsilon``. It has at most five significant digits, so that it can be quoted.

    The search begins with the central limit of the privacy loss, a Gaussian mechanism, and goes on with the upper bounds that
    the ledger reports: secant steps within a bracket.

    Args:
        epsilon: the target, above 0 and finite.
        delta: δ, in (0, 1).
        sampling_probability: q, in (0, 1].
        steps: T, at least 1.
        history: phases already spent, if training is resumed.

    Returns:
        σ, in units of the clip norm.

    Raises:
        ValueError: an argument is outside its range; the history alone overspends ``epsilon``; or no σ up to
            1e6 reaches it.

    Example:
        >>> round(noise_multiplier_for(8.0, 1e-5, sampling_probability=4096 / 50000, steps=875), 2)
        1.64

    Source: the bounds are those of :func:`lightning_dp.accounting.epsilon_bound`.
    """
    check_sampling_probability(sampling_probability)
    if whole("steps", steps, high=MOST_STEPS) < 1:
        raise ValueError(f"steps={steps}: expected at least 1 step to calibrate the noise for.")
    return noise_for(epsilon, delta, lambda sigma: Phase(sigma, sampling_probability, steps), history)


def noise_for(epsilon: float, delta: float, phase: Callable[[float], Phase], history: Sequence[Phase] = ()) -> float:
    """:func:`noise_multiplier_for` of any mechanism.

    Args:
        epsilon: the target, above 0 and finite.
        delta: δ, in (0, 1).
        phase: what the accountants compose for the steps to come, given σ: :func:`lightning_dp.accounting.phase.phase_of`.
        history: phases already spent, if training is resumed.

    Raises:
        ValueError: as of :func:`noise_multiplier_for`.
    """
    check_epsilon(epsilon)
    check_delta(delta)
    past = few(pool(history), MOST_MECHANISMS - 1)

    def spent(sigma: float | None) -> float:
        return epsilon_bound([*past, *([] if sigma is None else [phase(sigma)])], delta).epsilon

    low, high = 1e-6, 1e6
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        lost = math.exp(min(epsilon + float(log_ndtr(-epsilon / middle - middle / 2.0)), 0.0))
        good = float(ndtr(middle / 2.0 - epsilon / middle)) - lost <= delta  # Balle and Wang 2018, Theorem 8
        low, high = (middle, high) if good else (low, middle)
    search = _Search("epsilon", f"epsilon={epsilon:g} with delta={delta:g}", epsilon, spent, phase, past)
    search.check_reachable()
    if not can_simulate([phase(1.0)]):
        return search.confirm(search.by_central_limit(low), LARGEST_NOISE_MULTIPLIER)
    holds = search.by_rdp(delta)
    return search.confirm(search.by_closed_bound(holds, delta) or search.by_central_limit(low), holds)


def noise_for_risk(
    target: RiskTarget,
    phase: Callable[[float], Phase],
    history: Sequence[Phase] = (),
    total_variation: Callable[[float], float] = lambda sigma: 0.0,
) -> float:
    """:func:`noise_for` where the budget is a risk.

    Args:
        target: what may be risked.
        phase: as of :func:`noise_for`.
        history: likewise.
        total_variation: how far all steps are from what is composed, at a σ; it must not grow with σ.

    Raises:
        ValueError: as of :func:`noise_multiplier_for`.

    Example:
        >>> from lightning_dp.accounting.target import RiskTarget
        >>> round(noise_for_risk(RiskTarget("mu", 0.5), lambda sigma: Phase(sigma, 1.0, 4)), 3)
        4.0
    """
    past = few(pool(history), MOST_MECHANISMS - 1)

    def spent(sigma: float | None) -> float:
        if sigma is None:
            return target.risk(past)
        return target.risk([*past, phase(sigma)], total_variation(sigma))

    search = _Search(target.name, str(target), target.value, spent, phase, past)
    search.check_reachable()
    return search.confirm(search.by_central_limit(target.as_mu), LARGEST_NOISE_MULTIPLIER)


class _Search:
    """One calibration: the target, and what is spent as a function of σ, of the history alone for ``None``."""

    def __init__(
        self,
        name: str,
        asked: str,
        target: float,
        spent: Callable[[float | None], float],
        phase: Callable[[float], Phase],
        history: tuple[Phase, ...],
    ) -> None:
        self.name, self.asked, self.target = name, asked, target
        self.spent, self.phase, self.history = spent, phase, history

    def phases(self, sigma: float) -> list[Phase]:
        return [*self.history, self.phase(sigma)]

    def check_reachable(self) -> None:
        taken = sum(phase.steps for phase in self.history)
        spent = self.spent(None)
        what = "ε" if self.name == "epsilon" else self.name
        if self.history and spent >= self.target:
            raise ValueError(
                f"{self.asked}: the {taken} steps already taken have "
                f"spent {what} = {spent:.4g}. Expected a target above that. Raise {self.name}, or stop here."
            )
        if self.spent(LARGEST_NOISE_MULTIPLIER) > self.target:
            after, asked = f" after {taken} steps already taken" if taken else "", self.phase(LARGEST_NOISE_MULTIPLIER)
            raise ValueError(
                f"{self.asked}, sampling_probability="
                f"{asked.sampling_probability:.6g}, steps={asked.steps}{after}: expected a target that some noise multiplier "
                f"up to {LARGEST_NOISE_MULTIPLIER:g} reaches, but none does. Raise {self.name} or delta, or lower the "
                "number of steps or the expected batch size."
            )

    def by_rdp(self, delta: float) -> float:
        """A σ that holds: within 2 % of the smallest one by Rényi accounting."""
        fails, holds = _SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
        while holds / fails > 1.02:
            middle = math.sqrt(fails * holds)
            good = rdp_epsilon(self.phases(middle), delta) <= self.target
            fails, holds = (fails, middle) if good else (middle, holds)
        return holds

    def by_closed_bound(self, holds: float, delta: float) -> float | None:
        """A guess where ε takes a simulation: the bound in closed form is larger by about a seventh."""
        if not can_simulate(self.phases(holds)):
            return None
        fails = holds / 8.0
        while holds / fails > 1.005:
            middle = math.sqrt(fails * holds)
            good = can_simulate(self.phases(middle)) and closed_bound(self.phases(middle), delta) <= 1.14 * self.target
            fails, holds = (fails, middle) if good else (middle, holds)
        return holds

    def by_central_limit(self, mu: float) -> float:
        """A guess: μ² = Σ T·q²·(e^(1/σ²) − 1) of the mechanism asked for (Bu et al. 2020), and what the history has spent."""
        asked = self.phase(1.0)
        scale, q, turns = asked.noise_multiplier, asked.sampling_probability, asked.steps
        if asked.law == "allocation":
            turns *= block_of(q)
        spent = sum(one.steps * _growth(one.sampling_probability, one.noise_multiplier) for one in self.history)
        room = max(mu**2 - spent, 0.01 * mu**2)
        sigma = 1.0 / math.sqrt(math.log1p(room / (turns * q**2))) / scale
        return min(max(sigma, 10.0 * _SMALLEST_NOISE_MULTIPLIER), LARGEST_NOISE_MULTIPLIER / 10.0)

    def confirm(self, guess: float, holds: float) -> float:
        """Close in on the smallest σ whose reported bound holds: secant steps inside a bracket."""
        fails = _SMALLEST_NOISE_MULTIPLIER
        holds = _round_up(holds)
        slope = -1.1
        last: tuple[float, float] | None = None
        while holds / fails > 1.0 + _TOLERANCE:
            sigma = _round_up(guess)
            if not fails < sigma < holds:
                sigma = _round_up(math.sqrt(fails * holds))
            reported = self.spent(sigma)
            if reported <= self.target:
                holds = sigma
                if reported >= self.target * (1.0 - _TOLERANCE):
                    break
            else:
                fails = sigma
            if not 0.0 < reported < math.inf:
                guess = math.sqrt(fails * holds)
                continue
            here = math.log(sigma), math.log(reported / (self.target * (1.0 - _TOLERANCE / 2.0)))
            slope = _secant_slope(last, here, slope)
            last = here
            guess = math.exp(here[0] - here[1] / slope)
        return holds


def _growth(q: float, sigma: float) -> float:
    return q**2 * math.expm1(min(1.0 / sigma**2, 50.0))


def _secant_slope(last: tuple[float, float] | None, here: tuple[float, float], fallback: float) -> float:
    """Slope of log ε against log σ through two points, kept away from 0; ``fallback`` if there are no two."""
    if last is None or last[0] == here[0]:
        return fallback
    return min(-0.1, (here[1] - last[1]) / (here[0] - last[0]))


def _round_up(sigma: float) -> float:
    """``sigma`` rounded up to five significant digits."""
    value = Decimal(repr(sigma))
    return float(value.quantize(Decimal(1).scaleb(value.adjusted() - 4), rounding=ROUND_CEILING))
