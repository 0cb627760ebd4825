"""Rényi accounting of Poisson-subsampled Gaussian steps and of blocks: cheap, never fails, looser than PRV and PLD."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lightning_dp.accounting.allocation_moments import MOST, allocation_log_moments
from lightning_dp.accounting.phase import Phase, as_known
from lightning_dp.plan.privacy_plan import check_delta

FloatArray = npt.NDArray[np.float64]

_SHIFTED_ORDERS: FloatArray = np.concatenate(
    [
        np.geomspace(0.01, 0.9, 20),
        np.arange(1.0, 4.0, 0.1),
        np.arange(4.0, 12.0, 0.25),
        np.arange(12.0, 64.0),
        np.geomspace(64.0, 1e6, 90),
    ]
)
"""λ = α - 1 for every Rényi order α in use."""

ORDERS: FloatArray = _SHIFTED_ORDERS + 1.0
"""Every Rényi order α in use."""

_AMPLIFIED = (0.2, 2000.0)
"""σ for which the amplification of an allocation is worked out."""

_ROUNDING = 1e-14
"""Added to every cumulant, relatively and absolutely, so that rounding cannot make the bound too small."""


def privacy_loss(x: FloatArray, noise_multiplier: float, sampling_probability: float) -> FloatArray:
    """L(x) = log((1 - q) + q·exp((2x - 1) / 2σ²)), the privacy loss of one step at output ``x``.

    ``x`` is the noisy sum along the example's gradient in units of the clip norm: N(0, σ²) without the
    example, (1 - q)·N(0, σ²) + q·N(1, σ²) with it (Abadi et al. 2016, Lemma 3).
    """
    q = sampling_probability
    z = (2.0 * x - 1.0) / (2.0 * noise_multiplier**2)
    if q == 1.0:
        return z
    small = np.log1p(q * np.expm1(np.minimum(z, 1.0)))
    return np.where(z < 1.0, small, np.logaddexp(math.log1p(-q), math.log(q) + z))


@lru_cache(maxsize=512)
def log_moments(noise_multiplier: float, sampling_probability: float) -> FloatArray:
    """Upper bounds on log E[exp(α·L)] of one step, one per order (``inf`` where an order is not computed).

    The expectation is over N(0, σ²), the output without the example. Mironov, Talwar and Zhang (2019),
    section 3.3, show that the other direction (removing swapped with adding) is never larger, so this bounds
    both. The integrals are trapezoid sums, whose error falls exponentially for analytic integrands.
    """
    sigma, q = noise_multiplier, sampling_probability
    lam = _SHIFTED_ORDERS
    if sigma == 0:
        return np.full_like(lam, np.inf)
    unsampled = lam * (lam + 1.0) / (2.0 * sigma**2)
    if q == 1.0:
        return unsampled
    if sigma < 0.1:
        # The cumulant is convex in λ and 0 at λ = 0, so below λ = 1 it is at most its chord.
        at_one = np.logaddexp(0.0, 2.0 * math.log(q) + 1.0 / sigma**2)
        return np.minimum(unsampled, np.where(lam <= 1.0, lam * at_one, np.inf))
    moments = np.full_like(lam, np.inf)
    spacing = min(sigma / 4.0, sigma**2 / 3.0)
    log_scale = math.log(spacing / (sigma * math.sqrt(2.0 * math.pi)))
    for i, alpha in enumerate(lam + 1.0):
        if alpha > 1000.0 * sigma + 2.0:
            break
        x = np.arange(-12.0 * sigma, alpha + 12.0 * sigma, spacing)
        exponent = alpha * privacy_loss(x, sigma, q) - 0.5 * (x / sigma) ** 2
        moments[i] = _log_of_sum(exponent) + log_scale
    return np.minimum(np.maximum(moments, 0.0) * (1.0 + _ROUNDING) + _ROUNDING, unsampled)


def _log_of_sum(logarithms: FloatArray) -> float:
    """The logarithm of Σ exp, as ``scipy.special.logsumexp`` has it, to the bit, in a third of its time for short vectors.

    The argument is overwritten.
    """
    largest = logarithms.max()
    at = logarithms == largest
    count = float(at.sum())
    logarithms[at] = -np.inf
    return float(np.log1p(np.exp(logarithms - largest).sum() / count) + np.log(count) + largest)


def total_log_moments(phases: Iterable[Phase]) -> FloatArray:
    """Sum of the phases' log moments, one for each order: Rényi divergences add under composition."""
    total = np.zeros_like(_SHIFTED_ORDERS)
    for phase in phases:
        if phase.steps:
            total = total + phase.steps * log_moments_of(phase)
    return total


def log_moments_of(phase: Phase) -> FloatArray:
    """:func:`log_moments` of one round, whatever its law."""
    if phase.law == "allocation":
        return _allocation_moments(phase.noise_multiplier, phase.sampling_probability)
    known = as_known(phase)
    usual = log_moments(known.noise_multiplier, known.sampling_probability)
    if phase.seldom is None:
        return usual
    share, *others = phase.seldom
    rest = math.log1p(-share) if share < 1.0 else -math.inf
    mixed: FloatArray = np.logaddexp(rest + usual, math.log(share) + log_moments(*others))
    return np.maximum(mixed, usual) + _ROUNDING


@lru_cache(maxsize=512)
def _allocation_moments(sigma: float, q: float) -> FloatArray:
    """:func:`log_moments` of a block of 1/q steps of which an example is in exactly one.

    At most those of one step with q = 1, as if its step were known (quasi-convexity). The cumulant is convex in λ, so between
    whole λ it is at most its chord.
    """
    known = log_moments(sigma, 1.0)
    if q == 1.0 or not _AMPLIFIED[0] <= sigma <= _AMPLIFIED[1]:
        return known
    whole = np.arange(MOST + 1, dtype=np.float64)
    chords = np.interp(_SHIFTED_ORDERS, whole, allocation_log_moments(sigma, round(1.0 / q)))
    return np.minimum(known, np.where(_SHIFTED_ORDERS <= MOST, chords, np.inf))


def _conversion(delta: float) -> FloatArray:
    """What each order adds to the divergence to give ε (Canonne, Kamath and Steinke 2020, Proposition 12)."""
    alpha = _SHIFTED_ORDERS + 1.0
    conversion: FloatArray = np.log1p(-1.0 / alpha) - (math.log(delta) + np.log(alpha)) / _SHIFTED_ORDERS
    return conversion


def epsilon_of_log_moments(moments: FloatArray, delta: float) -> float:
    """The smallest ε over all orders; 0 at least, ``inf`` if no order is finite.

    It is 0 as well where δ exceeds the total variation distance, which is at most √(1 - exp(-divergence)) for
    the divergence of any order above 1 (Bretagnolle and Huber 1979).
    """
    if delta**2 >= -math.expm1(-float(np.min(moments / _SHIFTED_ORDERS))):
        return 0.0
    return max(0.0, float(np.min(moments / _SHIFTED_ORDERS + _conversion(delta))))


def rdp_epsilon(phases: Sequence[Phase], delta: float) -> float:
    """Upper bound on ε by Rényi differential privacy, under add/remove-one and Poisson sampling.

    Looser than the PRV bound by about 5 to 10 %, and the answer where PRV fails numerically.

    Args:
        phases: the composed steps, in any order.
        delta: δ, in (0, 1).

    Returns:
        ε, at least 0; ``math.inf`` if any step has no noise.

    Raises:
        ValueError: ``delta`` is outside (0, 1).

    Example:
        >>> round(rdp_epsilon([Phase(3.0, 0.08192, 875)], 1e-5), 1)
        3.9

    Source: Mironov, Talwar and Zhang (2019), "Rényi differential privacy of the sampled Gaussian mechanism",
    section 3.3; Canonne, Kamath and Steinke (2020), Proposition 12, for the conversion.
    """
    check_delta(delta)
    if not any(phase.steps for phase in phases):
        return 0.0
    return epsilon_of_log_moments(total_log_moments(phases), delta)


def steps_within(
    history: Sequence[Phase],
    each: Phase,
    delta: float,
    epsilon: float,
) -> float:
    """How many further rounds like that of ``each`` the Rényi bound allows after ``history`` (whole, or ``inf``)."""
    room = _SHIFTED_ORDERS * (epsilon - _conversion(delta)) - total_log_moments(history)
    step = log_moments_of(each)
    usable = np.isfinite(step) & (room > 0)
    if not usable.any():
        return 0.0
    # One step in a billion is left unspent, so that rounding cannot take the count past the bound.
    return math.floor(float(np.max(room[usable] / step[usable])) * (1.0 - 1e-9))
