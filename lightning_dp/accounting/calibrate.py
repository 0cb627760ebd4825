"""Finding the noise multiplier that spends a given ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import ROUND_CEILING, Decimal

from lightning_dp.accounting.epsilon import MOST_MECHANISMS, epsilon_bound, few, pool
from lightning_dp.accounting.mixture import can_simulate, closed_bound
from lightning_dp.accounting.phase import Phase, as_known
from lightning_dp.accounting.prv import EPSILON_ERROR, PrvFailureError, PrvGrid
from lightning_dp.accounting.rdp import rdp_epsilon
from lightning_dp.plan.privacy_plan import MOST_STEPS, check_delta, check_epsilon
from lightning_dp.plan.sampling import block_of, check_sampling_probability
from lightning_dp.validate import whole

LARGEST_NOISE_MULTIPLIER = 1e6
"""The search gives up beyond this σ."""

_SMALLEST_NOISE_MULTIPLIER = 1e-3
_TOLERANCE = 5e-4
_COARSE = 30.0
"""How much coarser than the reported bound's grid the search's grid is."""


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

    The search brackets σ with Rényi accounting, narrows it with PRV on a coarse grid, and ends with PRV upper
    bounds on the full grid, the ones the ledger reports.

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
    search = _Search(epsilon, delta, phase, few(pool(history), MOST_MECHANISMS - 1))
    search.check_reachable()
    holds = search.by_rdp()
    return search.confirm(search.by_closed_bound(holds) or search.by_coarse_prv(holds), holds)


class _Search:
    """One calibration: the target, and ε as a function of σ."""

    def __init__(
        self, epsilon: float, delta: float, phase: Callable[[float], Phase], history: tuple[Phase, ...]
    ) -> None:
        self.target, self.delta, self.phase, self.history = epsilon, delta, phase, history

    def phases(self, sigma: float) -> list[Phase]:
        return [*self.history, self.phase(sigma)]

    def check_reachable(self) -> None:
        taken = sum(phase.steps for phase in self.history)
        spent = epsilon_bound(self.history, self.delta).epsilon
        if spent >= self.target:
            raise ValueError(
                f"epsilon={self.target:g} with delta={self.delta:g}: the {taken} steps already taken have "
                f"spent ε = {spent:.4g}. Expected a target above that. Raise epsilon, or stop here."
            )
        if epsilon_bound(self.phases(LARGEST_NOISE_MULTIPLIER), self.delta).epsilon > self.target:
            after, asked = f" after {taken} steps already taken" if taken else "", self.phase(LARGEST_NOISE_MULTIPLIER)
            raise ValueError(
                f"epsilon={self.target:g} with delta={self.delta:g}, sampling_probability="
                f"{asked.sampling_probability:.6g}, steps={asked.steps}{after}: expected a target that some noise multiplier "
                f"up to {LARGEST_NOISE_MULTIPLIER:g} reaches, but none does. Raise epsilon or delta, or lower the "
                "number of steps or the expected batch size."
            )

    def by_rdp(self) -> float:
        """A σ that holds: within 2 % of the smallest one by Rényi accounting."""
        fails, holds = _SMALLEST_NOISE_MULTIPLIER, LARGEST_NOISE_MULTIPLIER
        while holds / fails > 1.02:
            middle = math.sqrt(fails * holds)
            if rdp_epsilon(self.phases(middle), self.delta) <= self.target:
                holds = middle
            else:
                fails = middle
        return holds

    def by_closed_bound(self, holds: float) -> float | None:
        """A guess where ε takes a simulation: the bound in closed form is larger by about a seventh."""
        if not can_simulate(self.phases(holds)):
            return None
        fails = holds / 8.0
        while holds / fails > 1.005:
            middle = math.sqrt(fails * holds)
            good = (
                can_simulate(self.phases(middle))
                and closed_bound(self.phases(middle), self.delta) <= 1.14 * self.target
            )
            fails, holds = (fails, middle) if good else (middle, holds)
        return holds

    def by_coarse_prv(self, start: float) -> float:
        """A guess at σ from PRV's estimate on a coarse grid; where PRV fails, the last good guess."""
        history, aim = tuple(map(_alike, self.history)), self.target - EPSILON_ERROR * min(1.0, self.target)
        sigma, slope = start, -1.1
        last: tuple[float, float] | None = None
        for _ in range(8):
            try:
                asked = _alike(self.phase(sigma))
                grid = PrvGrid(
                    history,
                    asked.noise_multiplier,
                    asked.sampling_probability,
                    self.delta,
                    asked.steps,
                    _COARSE * EPSILON_ERROR,
                )
                estimate = grid.epsilon(asked.steps)[0]
            except PrvFailureError:
                break
            if estimate <= 0.0:
                break
            here = math.log(sigma), math.log(estimate / aim)
            if abs(here[1]) < 1e-4:
                break
            slope = _secant_slope(last, here, slope)
            last = here
            sigma = min(start, max(_SMALLEST_NOISE_MULTIPLIER, math.exp(here[0] - here[1] / slope)))
        return sigma

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
            reported = epsilon_bound(self.phases(sigma), self.delta).epsilon
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


def _alike(phase: Phase) -> Phase:
    """Poisson-sampled steps that cost about as much, or more: enough for a guess."""
    if phase.law != "allocation":
        return as_known(phase)
    return Phase(phase.noise_multiplier, phase.sampling_probability, phase.steps * block_of(phase.sampling_probability))


def _secant_slope(last: tuple[float, float] | None, here: tuple[float, float], fallback: float) -> float:
    """Slope of log ε against log σ through two points, kept away from 0; ``fallback`` if there are no two."""
    if last is None or last[0] == here[0]:
        return fallback
    return min(-0.1, (here[1] - last[1]) / (here[0] - last[0]))


def _round_up(sigma: float) -> float:
    """``sigma`` rounded up to five significant digits."""
    value = Decimal(repr(sigma))
    return float(value.quantize(Decimal(1).scaleb(value.adjusted() - 4), rounding=ROUND_CEILING))
