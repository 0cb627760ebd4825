"""The scores of canaries if the plan is followed but for the size of its noise: simulated, and inverted into a bound on ε."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightning_dp.audit.decorrelated import decorrelated_score, strategy
from lightning_dp.audit.expected import Scores, log_likelihood_ratio, noise_on_a_canary
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan

_TIMES, _MOST_NUMBERS = 8, 3e7
"""How many canaries are simulated for each one seen, unless canaries times steps were more than this."""
_LEAST_NOISE, _MOST_NOISE = 2.0**-4, 2.0**5
"""Between which factors of the plan's noise one is looked for."""
Draw = npt.NDArray[np.bool_]


def simulated(
    plan: PrivacyPlan, steps: int, factor: float = 1.0, seed: int = 0, canaries: int = 20_000
) -> tuple[Scores, Scores]:
    """Scores of canaries that are in, and of others, in ``steps`` steps as planned with noise ``factor`` times as large.

    A canary's gradient has norm C and points where nobody else's does; it is drawn as the plan says, by code that shares
    nothing with the package's sampler. The attacker knows the plan and not ``factor``, as in the audit.

    Args:
        plan: with σ > 0.
        steps: T.
        factor: κ > 0.
        seed: of the simulation: with the same, two ``factor`` differ by nothing but it.
        canaries: how many to simulate, half of them in.

    Raises:
        ValueError: there is no simulation of this sampling.
    """
    mechanism, correlation = plan.mechanism, plan.mechanism.noise.correlation
    members = np.arange(canaries) % 2 == 0
    noise = factor * noise_on_a_canary(mechanism)
    generator = np.random.default_rng(seed)
    draws = _draws(mechanism, members, generator)
    if correlation is None:
        unit, scores = plan.clip_norm / mechanism.divisor, np.zeros(canaries)
        for _ in range(steps):
            scores += log_likelihood_ratio(
                (next(draws) + noise * generator.standard_normal(canaries)) * unit, mechanism
            )
    else:
        drawn = np.array([next(draws) for _ in range(steps)], dtype=np.float64)
        rows = strategy(correlation, steps) @ drawn + noise * generator.standard_normal((steps, canaries))
        scores = decorrelated_score(rows, correlation, mechanism.noise.noise_multiplier, mechanism.sampling.probability)
    return scores[members], scores[~members]


def _draws(mechanism: Mechanism, members: Draw, generator: np.random.Generator) -> Iterator[Draw]:
    """Who is drawn, step by step."""
    scheme, q = mechanism.sampling.scheme, mechanism.sampling.probability
    groups, block = mechanism.groups, mechanism.sampling.block
    mine, step = generator.integers(max(groups, block), size=len(members)), 0
    if scheme not in ("poisson", "cyclic_poisson", "random_allocation", "balls_in_bins"):
        raise ValueError(f"sampling={scheme!r}: no simulation of it")
    while True:
        if scheme == "random_allocation" and step % block == 0:
            mine = generator.integers(block, size=len(members))
        if scheme in ("random_allocation", "balls_in_bins"):
            yield members & (mine == step % block)
        else:
            yield members & (mine == step % groups) & (generator.random(len(members)) < groups * q)
        step += 1


def separation(present: Scores, absent: Scores) -> tuple[float, float]:
    """How often a canary that is in has the higher score of two, and the variance of this estimate (DeLong).

    Example:
        >>> separation(np.array([2.0, 3.0]), np.array([0.0, 1.0]))
        (1.0, 0.0)

    Source: DeLong, DeLong and Clarke-Pearson (1988), "Comparing the areas under two or more correlated receiver operating
    characteristic curves".
    """
    order, m, n = stats.rankdata(np.concatenate([present, absent])), len(present), len(absent)
    above = (order[:m] - stats.rankdata(present)) / n  # the share of absent ones below each present one
    below = 1.0 - (order[m:] - stats.rankdata(absent)) / m
    return float(np.mean(above)), float(np.var(above, ddof=1) / m + np.var(below, ddof=1) / n)


def noise_factor(scores: Scores, members: Draw, plan: PrivacyPlan, steps: int, confidence: float) -> float | None:
    """The least factor κ of the plan's noise that the scores refute, with ``confidence``, as they do every larger one.

    Compared is :func:`separation`, which does not depend on the scores' scale, with that of :func:`simulated`, by a one-sided
    test that allows for the errors of both.

    Returns:
        κ, at least 1/16: above 1 nothing speaks against the plan, and below 1 the run has told more than planned. ``None`` if
        not even 32 times the noise is refuted.
    """
    return crossing(lambda factor: told_more_than(factor, scores, members, plan, steps, 1.0 - confidence))


def told_more_than(factor: float, scores: Scores, members: Draw, plan: PrivacyPlan, steps: int, level: float) -> bool:
    """Whether the scores are told apart better than with ``factor`` times the plan's noise: a test of that level."""
    found, error = separation(scores[members], scores[~members])
    canaries = int(max(2000, min(_TIMES * len(scores), _MOST_NUMBERS / max(1, steps))))
    expected, simulation_error = separation(*simulated(plan, steps, factor, canaries=canaries))
    return found - expected > float(stats.norm.isf(level)) * math.sqrt(error + simulation_error)


def crossing(refuted: Callable[[float], bool]) -> float | None:
    """The least factor from 1/16 on that is refuted, to a part in a thousand, if all larger ones are; ``None`` if 32 is not.

    Example:
        >>> round(crossing(lambda factor: factor > 1.5), 2)
        1.5
    """
    low, high = _LEAST_NOISE, _MOST_NOISE
    for middle in (1.0, 1.1, 2.0):  # where it mostly is
        if refuted(middle):
            high = middle
            break
        low = middle
    if high == _MOST_NOISE and not refuted(high):
        return None
    if low == _LEAST_NOISE and refuted(low):
        return low
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        if refuted(middle):
            high = middle
        else:
            low = middle
    return high
