"""The whole curve: δ at every ε, and from it what any test can achieve, as upper bounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import log_ndtr, ndtr, ndtri

from lightning_dp.accounting.epsilon import epsilon_bound, few, pool
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.pld import pld_curve
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.rdp import FloatArray

SMALLEST_RATE = 1e-10
"""Of the errors of a test, for which μ is found. Below, curves of subsampled mechanisms are no Gaussian's."""

_POINTS = 2000
_KNOWN_AT = (0.5, 0.3, *(10.0 ** -np.arange(1.0, 13.01, 0.5)))
_LARGEST = 600.0
_UP = 1.0 + 1e-9


@dataclass(frozen=True)
class Curve:
    """δ as an upper bound at ascending ε ≥ 0, in both directions.

    Args:
        epsilon: ``(n,)``.
        removed: δ with P the law of what is released with the example and Q without it: P(E) ≤ e^ε·Q(E) + δ for all events E.
        added: δ with P and Q exchanged.

    A test that says "in" wrongly with probability α (the false positive rate) says so rightly with probability at most

        TPR(α) = min over ε of min(δ(ε) + e^ε·α, 1 − e^(−ε)·(1 − α − δ′(ε))),

    δ in the direction in which Q is the hypothesis to be refuted and δ′ in the other. The first is what δ(ε) says of the test,
    the second what δ′(ε) says of its complement.

    Source: Dong, Roth and Su 2022, Proposition 2.12 (arXiv 1905.02383), for each direction by itself.
    """

    epsilon: FloatArray
    removed: FloatArray
    added: FloatArray

    def but_for(self, total_variation: float) -> Curve:
        """The curve of everything within this distance τ of what this one is about: δ(ε) grows by (1 + e^ε)·τ."""
        if total_variation == 0.0:
            return self
        more = (1.0 + np.exp(self.epsilon)) * total_variation
        return Curve(self.epsilon, np.minimum(self.removed + more, 1.0), np.minimum(self.added + more, 1.0))

    @classmethod
    def of(cls, epsilon: float, delta: float) -> Curve:
        """What (ε, δ) alone says."""
        return cls(np.array([epsilon]), np.array([delta]), np.array([delta]))

    @classmethod
    def gaussian(cls, mu: float, points: int = _POINTS) -> Curve:
        """Of N(0, 1) against N(μ, 1), for μ > 0, rounded up by a part in 1e9.

        Source: Balle and Wang 2018, Theorem 8.

        Example:
            >>> round(Curve.gaussian(1.0).least(float(ndtr(0.5))), 3)  # Φ(0.5 - 1)
            0.309
        """
        epsilon = np.linspace(0.0, min(_LARGEST, mu**2 / 2.0 + 8.0 * mu), points)
        log_power = log_ndtr(mu / 2.0 - epsilon / mu)
        ratio = np.minimum(epsilon + log_ndtr(-mu / 2.0 - epsilon / mu) - log_power, 0.0)
        delta = np.exp(log_power) * -np.expm1(ratio) * _UP
        return cls(epsilon, delta, delta)

    @property
    def delta(self) -> FloatArray:
        """The larger of both directions."""
        return np.maximum(self.removed, self.added)

    @cached_property
    def lines(self) -> tuple[FloatArray, FloatArray]:
        """Slopes and heights at 0 of the lines whose highest is :meth:`least`."""
        grow, shrink = np.exp(self.epsilon), np.exp(-self.epsilon)
        return np.concatenate([shrink, grow]), np.concatenate([-shrink * self.delta, 1.0 - self.delta - grow])

    def least(self, probability: float) -> float:
        """The least probability of an event that has ``probability`` under a neighbour, in either direction; convex.

        It is 1 − TPR(1 − ``probability``) of the larger δ, without an array for each α: audits ask a thousand times.

        Example:
            >>> round(Curve.of(1.0, 0.0).least(0.5), 4)  # e⁻¹ / 2
            0.1839
        """
        slopes, heights = self.lines
        return max(0.0, float(np.max(slopes * probability + heights)))

    def epsilon_at(self, delta: float) -> float:
        """An ε that has this δ; ``inf`` if none is known."""
        fails = np.flatnonzero(self.delta > delta)
        i = int(fails[-1]) + 1 if fails.size else 0
        if i == len(self.epsilon):
            return math.inf
        if i == 0:
            return float(self.epsilon[0])
        # δ is convex in e^ε, so that it lies below the chord.
        low, high = float(self.epsilon[i - 1]), float(self.epsilon[i])
        above, below = float(self.delta[i - 1]), float(self.delta[i])
        share = min(1.0, (above - delta) / (above - below) * _UP)
        return low + math.log1p(share * math.expm1(high - low))

    @property
    def advantage(self) -> float:
        """The most by which the rate of right accusations exceeds that of wrong ones, the total variation distance."""
        both = 1.0 - 2.0 * (1.0 - self.delta) / (1.0 + np.exp(self.epsilon))
        at_zero = (
            min(self.removed[0], self.added[0]) if self.epsilon[0] == 0.0 else 1.0
        )  # the same number, bounded twice
        return float(min(1.0, at_zero, float(np.min(both))))

    def tpr(self, fpr: FloatArray | float) -> FloatArray:
        """TPR(α) at each false positive rate α, the larger of both directions."""
        at = np.atleast_1d(np.asarray(fpr, dtype=np.float64))[:, None]
        ratio = np.exp(self.epsilon)
        found = [
            np.minimum(
                np.min(one + ratio * at, axis=1),
                np.min(1.0 - (1.0 - at - other) / ratio, axis=1),
            )
            for one, other in ((self.removed, self.added), (self.added, self.removed))
        ]
        return np.asarray(np.clip(np.maximum(*found), 0.0, 1.0), dtype=np.float64)

    def mu(self) -> float:
        """The smallest μ for which no test beats μ-GDP whose errors and excess TPR − FPR are :data:`SMALLEST_RATE` or more.

        TPR(α) is a polygon, and that of a Gaussian is concave, so corners decide. Those right of where the slope is 1 are the
        ones left of it in the other direction, with the errors exchanged.
        """
        if float(self.tpr(SMALLEST_RATE)[0]) > 1.0 - SMALLEST_RATE:
            return math.inf
        found = [2.0 * float(ndtri((1.0 + self.advantage) / 2.0))]
        for delta in (self.removed, self.added):
            slope, height = _lowest(np.exp(self.epsilon), delta)
            alpha = ((height[:-1] - height[1:]) / np.diff(slope))[::-1]
            power = height[1:][::-1] + slope[1:][::-1] * alpha
            alpha, power = np.concatenate([[0.0], alpha]), np.concatenate([[float(np.min(height))], power])
            ends = [
                SMALLEST_RATE,
                np.interp(SMALLEST_RATE, power - alpha, alpha),
                np.interp(1.0 - SMALLEST_RATE, power, alpha),
            ]
            at = np.concatenate([alpha, ends])
            reached = np.interp(at, alpha, power)
            least = np.minimum(np.minimum(at, reached - at), 1.0 - reached)
            counts = (least >= SMALLEST_RATE * (1.0 - 1e-3)) & (at <= alpha[-1])
            found.append(float(np.max(ndtri(reached[counts]) - ndtri(at[counts]), initial=0.0)))
        return max(found) * _UP

    def regret(self, mu: float) -> float:
        """The smallest Δ for which f(α + Δ) − Δ ≤ G(α) everywhere: how far μ-GDP lies from this curve f = 1 − TPR.

        Source: Gomez et al. 2025 (arXiv 2503.10945), section 3; Kaissis et al. 2024 (arXiv 2406.08918) for the distance.
        """
        at = np.sin(np.linspace(0.0, np.pi / 2.0, 257)) ** 2  # dense at both ends, where curves bend
        gaussian = ndtr(-mu - ndtri(at)) if mu < math.inf else np.zeros_like(at)
        miss, low, high = 1.0 - self.tpr(at), 0.0, 1.0
        for _ in range(24):
            middle = (low + high) / 2.0
            shifted = np.interp(np.minimum(at + middle, 1.0), at, miss) - middle
            low, high = (low, middle) if np.all(shifted <= gaussian) else (middle, high)
        return low


def _lowest(slope: FloatArray, height: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Those lines that are lowest somewhere, of ascending slopes: the lower convex hull of (slope, height)."""
    kept: list[int] = []
    for i in range(len(slope)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (height[b] - height[a]) * (slope[i] - slope[a]) < (height[i] - height[a]) * (slope[b] - slope[a]):
                break
            kept.pop()
        kept.append(i)
    return slope[kept], height[kept]


def curve_of(phases: Sequence[Phase]) -> Curve:
    """The curve of all ``phases`` composed: :func:`composed`, or, where no grid holds the losses, what is known of it.

    That is ε at many δ, by :func:`lightning_dp.accounting.epsilon.epsilon_bound`, whatever it uses.
    """
    try:
        return composed(phases)
    except PrvFailureError:
        return _by_points([phase for phase in phases if phase.steps])


def composed(phases: Sequence[Phase], points: int = _POINTS, smallest: float = 1e-13) -> Curve:
    """The curve of all ``phases`` composed, at so many ε.

    | phases | from |
    |---|---|
    | none | δ = 0 |
    | one without noise | δ = 1 |
    | q = 1 throughout | the Gaussian mechanism, in closed form |
    | otherwise | privacy losses on a grid, to where δ is ``smallest``; of many phases, neighbours are put together |

    Raises:
        PrvFailureError: no grid holds the losses.
    """
    taken = pool(phases)
    if not taken or any(phase.noise_multiplier == 0 for phase in taken):
        return Curve.of(0.0, 1.0 if taken else 0.0)
    mu = gaussian_mu(taken)
    return Curve(*pld_curve(few(taken), points, smallest)) if mu is None else Curve.gaussian(mu, points)


def gaussian_mu(phases: Sequence[Phase]) -> float | None:
    """μ of phases without sampling, which are Gaussian mechanisms; ``None`` if there are others.

    Source: Dong, Roth and Su 2022, Corollary 3.3.
    """
    if any(phase.sampling_probability != 1 or phase.noise_multiplier == 0 or phase.seldom for phase in phases):
        return None
    return math.sqrt(sum(phase.steps / phase.noise_multiplier**2 for phase in phases))


def _by_points(phases: Sequence[Phase]) -> Curve:
    found = {epsilon_bound(phases, float(delta)).epsilon: float(delta) for delta in sorted(_KNOWN_AT, reverse=True)}
    known = sorted((epsilon, delta) for epsilon, delta in found.items() if epsilon <= _LARGEST)
    epsilon, delta = np.array([[0.0, 1.0]] if not known or known[0][0] > 0.0 else []).reshape(-1, 2).T
    if known:
        more = np.array(known).T
        epsilon, delta = np.append(epsilon, more[0]), np.append(delta, more[1])
    return Curve(epsilon, delta, delta)
