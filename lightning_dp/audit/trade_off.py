"""How well two neighbouring datasets can be told apart, as one curve: what a one-run audit holds guesses against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.pld import pld_curve
from lightning_dp.accounting.prv import PrvFailureError

_POINTS = 400
_EPSILONS = np.concatenate([[0.0], np.geomspace(1e-3, 60.0, 360)])
"""Where δ(ε) is computed, of a Gaussian and of what is composed. Between them the curve is bounded by straight lines, which
only makes a claim weaker."""
_LEAST_NOISE = 0.2


@dataclass(frozen=True, eq=False)
class TradeOff:
    """A symmetric trade-off curve, given by upper bounds δ(ε) at some ε: events cannot differ by more between neighbours.

    For every event E and both orders of two neighbouring datasets, P[E | one] ≤ e^ε P[E | other] + δ(ε).

    Args:
        epsilons: ε, at least 0.
        deltas: δ(ε) at each.

    Source: Dong, Roth and Su (2022), "Gaussian differential privacy", Proposition 6.
    """

    epsilons: npt.NDArray[np.float64]
    deltas: npt.NDArray[np.float64]

    @cached_property
    def lines(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Slopes and heights at 0 of the lines whose highest is the curve."""
        grow, shrink = np.exp(self.epsilons), np.exp(-self.epsilons)
        heights = np.concatenate([-shrink * self.deltas, 1.0 - self.deltas - grow])
        return np.concatenate([shrink, grow]), heights

    def least(self, probability: float) -> float:
        """The least probability under one dataset of an event that has ``probability`` under a neighbour; convex.

        Example:
            >>> round(TradeOff.of(1.0, 0.0).least(0.5), 4)  # e⁻¹ / 2
            0.1839
        """
        slopes, heights = self.lines
        return max(0.0, float(np.max(slopes * probability + heights)))

    @classmethod
    def of(cls, epsilon: float, delta: float) -> TradeOff:
        """What (ε, δ) alone claims."""
        return cls(np.array([epsilon]), np.array([delta]))

    @classmethod
    def gaussian(cls, mu: float) -> TradeOff:
        """Of N(0, 1) against N(μ, 1), for μ > 0 (Balle and Wang 2018, Theorem 8).

        Example:
            >>> round(TradeOff.gaussian(1.0).least(float(ndtr(0.5))), 3)  # Φ(0.5 - 1)
            0.309
        """
        lost = np.exp(np.minimum(_EPSILONS + log_ndtr(-_EPSILONS / mu - mu / 2.0), 700.0))
        return cls(_EPSILONS, ndtr(-_EPSILONS / mu + mu / 2.0) - lost)

    @classmethod
    def of_phases(cls, phases: Sequence[Phase], delta: float, taken: float = 0.0) -> TradeOff:
        """What the accountant claims for ``phases``.

        Args:
            phases: with noise.
            delta: δ of the claim; the curve is followed to a thousandth of it.
            taken: τ, how far the run may be from ``phases`` in total variation, which costs (1 + e^ε)·τ.

        Raises:
            PrvFailureError: as of :func:`~lightning_dp.accounting.pld.pld_bound`, σ below 0.2, or an
                accountant that simulates.
        """
        if any(phase.law == "bins" for phase in phases):
            raise PrvFailureError("its accountant simulates, and has no curve")
        if min(phase.noise_multiplier for phase in phases) < _LEAST_NOISE:
            raise PrvFailureError(f"noise below {_LEAST_NOISE} says next to nothing, and a grid cannot hold it")
        epsilons, *ways = pld_curve(phases, _POINTS, min(delta, 1e-6) / 1e3)
        return cls(epsilons, np.minimum(1.0, np.max(ways, axis=0) + (1.0 + np.exp(epsilons)) * taken))


def with_noise(phases: Sequence[Phase], factor: float) -> list[Phase]:
    """The same steps with noise ``factor`` times as large.

    Example:
        >>> with_noise([Phase(2.0, 0.1, 5)], 1.5)[0].noise_multiplier
        3.0
    """
    return [
        replace(
            phase,
            noise_multiplier=phase.noise_multiplier * factor,
            seldom=phase.seldom and phase.seldom._replace(noise_multiplier=phase.seldom.noise_multiplier * factor),
        )
        for phase in phases
    ]


def gaussian_shift(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism with that (ε, δ) (Balle and Wang 2018, Theorem 8)."""

    def excess(mu: float) -> float:
        lost = math.exp(min(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)), 700.0))
        return float(ndtr(-epsilon / mu + mu / 2)) - lost - delta

    return float(brentq(excess, 1e-4, 2.0 * math.sqrt(2.0 * epsilon) + epsilon + 10.0))
