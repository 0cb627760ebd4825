"""A lower bound on ε from scores that are read as two Gaussians: one with the canary, one without. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

HIGHEST = 60.0
"""No ε above this is looked for."""
NOT_GAUSSIAN = 1e-4
"""Scores less likely than this from a Gaussian, by skewness and kurtosis, are not read as one."""
_SHARE_OF_SPREAD = 0.2
"""The part of the error probability that is spent on the ratio of the two spreads; the rest goes to their distance."""


@dataclass(frozen=True)
class PairBound:
    """What two samples of scores say, read as Gaussians.

    Attributes:
        epsilon: the lower bound on ε; ``None`` if a sample does not look like a Gaussian, or is too small.
        distance: how far the means are apart, in standard deviations of the scores without the canary.
        spread: standard deviation with the canary over that without.
        gaussian: the smaller p-value of a test of either sample for skewness and kurtosis.
    """

    epsilon: float | None
    distance: float
    spread: float
    gaussian: float


def pair_bound(
    scores: npt.NDArray[np.float64], members: npt.NDArray[np.bool_], delta: float, confidence: float
) -> PairBound:
    """The smallest ε of a pair of Gaussians that the scores do not refute.

    The scores of all canaries are taken for independent, N(a, s²) without the canary and N(b, t²) with it. With
    ``confidence``, (b - a)/s is at least a lower limit and t/s lies between two; the bound is the smallest ε at δ over these,
    in the direction of the two (remove, add) that says more.

    Args:
        scores: one for each canary, ``(m,)``; high means "was trained on".
        members: whether each canary was in, ``(m,)``.
        delta: δ.
        confidence: that ε is at least this, if the scores are what they are taken for, for m in the thousands.

    Example:
        >>> noise, members = np.random.default_rng(0).standard_normal(20_000), np.arange(20_000) % 2 == 0
        >>> bound = pair_bound(noise + members, members, 1e-5, 0.95)
        >>> 4.0 < bound.epsilon < pair_epsilon(1.0, 1.0, 1e-5) < 4.4
        True

    Source: Agrawal, Wei, Singh, Magdon-Ismail and Zikas (2026), "Let's ask Gauss: improved one-run privacy auditing",
    arXiv 2606.12733. The limits are ours.
    """
    present, absent = scores[members], scores[~members]
    if min(len(present), len(absent)) < 20 or float(np.std(absent)) == 0.0 or float(np.std(present)) == 0.0:
        return PairBound(None, 0.0, 1.0, 0.0)
    gaussian = float(min(stats.normaltest(present).pvalue, stats.normaltest(absent).pvalue))
    s = float(np.std(absent, ddof=1))
    distance, spread = float(np.mean(present) - np.mean(absent)) / s, float(np.std(present, ddof=1)) / s
    level = 1.0 - confidence
    variance = 1.0 / len(absent) + spread**2 / len(present) + distance**2 / (2.0 * len(absent))
    least = distance - float(stats.norm.isf(level * (1.0 - _SHARE_OF_SPREAD))) * math.sqrt(variance)
    error = math.sqrt(0.5 / len(present) + 0.5 / len(absent)) * float(stats.norm.isf(level * _SHARE_OF_SPREAD / 2.0))
    spreads = spread * np.exp(np.append(np.linspace(-error, error, 41), np.clip(-math.log(spread), -error, error)))
    epsilon = min(pair_epsilon(max(least, 0.0), float(one), delta) for one in spreads)
    return PairBound(epsilon if gaussian >= NOT_GAUSSIAN else None, distance, spread, gaussian)


def pair_epsilon(distance: float, spread: float, delta: float) -> float:
    """ε at δ between N(0, 1) and N(``distance``, ``spread``²), in the direction that is larger; at most :data:`HIGHEST`.

    Example:
        >>> round(pair_epsilon(1.0, 1.0, 1e-5), 3)  # the Gaussian mechanism with σ = 1
        4.377
    """

    def excess(epsilon: float) -> float:
        return max(_beyond(epsilon, distance, spread), _beyond(epsilon, -distance / spread, 1.0 / spread)) - delta

    if excess(0.0) <= 0:
        return 0.0
    return HIGHEST if excess(HIGHEST) > 0 else float(brentq(excess, 0.0, HIGHEST, xtol=1e-9))


def _beyond(epsilon: float, mean: float, spread: float) -> float:
    """The hockey-stick divergence max over E of P[E] - e^ε·Q[E], for P = N(``mean``, ``spread``²) and Q = N(0, 1).

    The best E is where log(dP/dQ) = a·x² + b·x + c is at least ε: outside of two points, between them, or on one side.
    """
    a, b = (1.0 - spread**-2) / 2.0, mean / spread**2
    c = -math.log(spread) - mean**2 / (2.0 * spread**2) - epsilon
    if abs(a) < 1e-12:
        if b == 0:
            return 0.0
        parts = [(-c / b, math.inf) if b > 0 else (-math.inf, -c / b)]
    elif (inside := b * b - 4.0 * a * c) <= 0:
        parts = [] if a < 0 else [(-math.inf, math.inf)]
    else:
        low, high = sorted((-b + sign * math.sqrt(inside)) / (2.0 * a) for sign in (-1.0, 1.0))
        parts = [(low, high)] if a < 0 else [(-math.inf, low), (high, math.inf)]
    with_it = sum(_mass((low - mean) / spread, (high - mean) / spread) for low, high in parts)
    return with_it - math.exp(epsilon) * sum(_mass(low, high) for low, high in parts)


def _mass(low: float, high: float) -> float:
    """P[``low`` ≤ Z ≤ ``high``] for a standard Gaussian, without cancellation in the upper tail."""
    return float(ndtr(-low) - ndtr(-high)) if low > 0 else float(ndtr(high) - ndtr(low))
