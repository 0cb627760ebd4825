"""Rényi moments of a block of which an example is in exactly one step: what they cost without a grid of losses."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy.special import gammaln, logsumexp

FloatArray = npt.NDArray[np.float64]

MOST = 128
"""The largest order, less 1, that is worked out."""

_REACH = 12.0
"""How many standard deviations of an output are integrated over."""

_ROUNDING = 1e-9
"""Added to every cumulant, relatively and absolutely: far above what rounding and quadrature are off by."""


@lru_cache(maxsize=512)
def allocation_log_moments(noise_multiplier: float, steps: int) -> FloatArray:
    r"""Upper bounds on (α - 1)·D_α of a block in both directions, for α - 1 = 0, 1, …, :data:`MOST`; ``(MOST + 1,)``.

    With S = (1/k)·ΣX_j, the mean of k independent lognormals X = exp((2x - 1)/2σ²), x ~ N(0, σ²), they are log E[S^{λ+1}] for
    the example removed and log E[S^{-λ}] for it added, λ = α - 1 (see :mod:`lightning_dp.accounting.likelihood_ratio`):

    .. math::
        E\Big[\Big(\sum_j X_j\Big)^n\Big] = n!\,[z^n] \Big(\sum_m \frac{e^{m(m-1)/2\sigma^2}}{m!} z^m\Big)^k, \qquad
        E[S^{-\lambda}] = \frac{1}{\Gamma(\lambda)} \int_0^\infty u^{\lambda-1} \big(E\, e^{-uX/k}\big)^k\, du .

    The power is taken by repeated squaring of a series of positive terms, in logarithms. The integrals, of log u and of x, are
    trapezoid sums, whose error falls exponentially for analytic integrands.

    Where λ > 4σk, outputs further out than 12σ would matter, and S ≥ ΠX_j^{1/k} gives λ(λ + k)/2kσ² for the second.

    Args:
        noise_multiplier: σ > 0.
        steps: k.

    Example:
        >>> moments = allocation_log_moments(2.0, 10)
        >>> bool(moments[1] >= math.log1p(math.expm1(0.25) / 10))  # the variance of S
        True
    """
    found = np.maximum(_removed(noise_multiplier, steps), _added(noise_multiplier, steps))
    return np.maximum(found, 0.0) * (1.0 + _ROUNDING) + (_ROUNDING + 1e-14 * steps) * (np.arange(MOST + 1) > 0)


def _removed(sigma: float, steps: int) -> FloatArray:
    """Of log E[S^{λ+1}], λ = 0, …, MOST."""
    power = np.arange(MOST + 2, dtype=np.float64)
    one = power * (power - 1.0) / (2.0 * sigma**2) - gammaln(power + 1.0)
    total, square, left = None, one, steps
    while left:
        if left & 1:
            total = square if total is None else _product(total, square)
        left >>= 1
        if left:
            square = _product(square, square)
    assert total is not None
    moments: FloatArray = total + gammaln(power + 1.0) - power * math.log(steps)
    return moments[1:]


def _product(a: FloatArray, b: FloatArray) -> FloatArray:
    """Of two series, whose coefficients are given by their logarithms."""
    place = np.subtract.outer(np.arange(len(a)), np.arange(len(a)))
    terms = np.where(place >= 0, a + b[np.maximum(place, 0)], -np.inf)
    product: FloatArray = logsumexp(terms, axis=1)
    return product


def _added(sigma: float, steps: int) -> FloatArray:
    """Of log E[S^{-λ}], λ = 0, …, MOST."""
    z = np.arange(-_REACH, _REACH, min(0.25, sigma / 3.0))
    weight = np.exp(-0.5 * z**2)
    value = np.exp(z / sigma - 0.5 / sigma**2)
    spacing = min(0.06, sigma / 8.0)
    low, high = -24.0 - math.log(steps), 0.5 / sigma**2 + _REACH / sigma + 4.0 + math.log(MOST)
    log_u = np.arange(low, high, spacing)
    laplace = np.exp(-np.exp(log_u)[:, None] * value) @ (weight / weight.sum())
    log_power = steps * np.log(np.clip(laplace, np.finfo(np.float64).tiny, 1.0))
    order = np.arange(1.0, MOST + 1.0)
    exponent = order[:, None] * (log_u + math.log(steps)) + log_power
    top = exponent.max(axis=1)
    integrals = np.log(np.exp(exponent - top[:, None]).sum(axis=1)) + top + math.log(spacing) - gammaln(order)
    by_the_mean = order * (order + steps) / (2.0 * steps * sigma**2)
    return np.concatenate([[0.0], np.where(order <= 4.0 * sigma * steps, integrals, by_the_mean)])
