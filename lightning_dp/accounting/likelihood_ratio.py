"""The likelihood ratio of one round, on a grid: a discrete law that dominates it, for both directions at once.

Let Q be the law of a round's outputs without the example, P with it, and S = dP/dQ. The hockey-stick divergences of (P, Q) and
of (Q, P) are expectations under Q of convex functions of S: E[(S - e^ε)₊] and E[(1 - e^ε S)₊]. So whatever spreads S under Q
while keeping its mean bounds both at every ε. That makes the pair of laws less private than the true one, in the order of
Blackwell, and this order is kept by composition (Zhu, Dong and Wang 2022, Theorem 10). Spreading is what is done here: the mass
between two points of a grid goes to the two in the proportion that keeps its mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.special import ndtr, ndtri

from lightning_dp.accounting.rdp import FloatArray

_MOST_CELLS, _POINTS = 2**20, 1000
_ROWS = 50
_FEWEST_BITS, _MOST_BITS, _CELLS_IN_WIDTH = 7, 19, 64.0
_LITTLE_NOISE = 0.5
_CELLS_IN_DEVIATION = 50.0
"""How many cells of the grid a standard deviation has: spreading adds at most 1/4·50² of the variance."""

ROUNDING = 32 * 2.0**-52
"""Relative error of one product of Fourier coefficients, with room to spare."""


@dataclass(frozen=True)
class RatioLaw:
    """A law of S on points, under P and under Q.

    Args:
        ratio: the points, ascending and above 0, ``(n,)``.
        with_it: P's mass there.
        without_it: Q's mass there.
        infinite: what P has beyond: S = ∞.
        zero: what Q has at S = 0.
    """

    ratio: FloatArray
    with_it: FloatArray
    without_it: FloatArray
    infinite: float
    zero: float


def lognormal_law(sigma: float, edges: FloatArray, share: float = 1.0) -> RatioLaw:
    """The law of S = 1 - q + q·X on ``edges``, with X the ratio of N(1, σ²) to N(0, σ²), which is lognormal.

    Args:
        sigma: σ.
        edges: ascending points of S, of which the first may be 0.
        share: q, in (0, 1].
    """
    with np.errstate(divide="ignore"):
        # x, the output at which S is this; -∞ below the smallest S there is
        x = sigma**2 * np.log(np.maximum(edges - (1.0 - share), 0.0) / share) + 0.5
    without, shifted = _cells(x / sigma), _cells((x - 1.0) / sigma)
    with_it = (1.0 - share) * without + share * shifted
    below, above = edges[:-1], edges[1:]
    up = np.clip((with_it[1:-1] - below * without[1:-1]) / (above - below), 0.0, without[1:-1])
    on = np.zeros_like(edges)
    on[1:] += up
    on[:-1] += without[1:-1] - up
    on[-1] += without[-1]
    zero = float(without[0])
    if edges[0] == 0.0:
        zero, on, edges = zero + float(on[0]), on[1:], edges[1:]
    return RatioLaw(edges, on * edges, on, float(with_it[-1] + with_it[0]), zero)


def _cells(u: FloatArray) -> FloatArray:
    """Mass of a standard normal below the first point, between the points and above the last, exact in either tail."""
    below, above = ndtr(u), ndtr(-u)
    between = np.where(u[1:] < 0.0, np.diff(below), -np.diff(above))
    return np.concatenate([below[:1], between, above[-1:]])


@lru_cache(maxsize=64)
def allocation_law(sigma: float, steps: int, tail: float) -> RatioLaw:
    """The law of S for ``steps`` steps with noise σ of which the example is in exactly one, each as likely.

    S is the mean of k independent lognormals X under Q; under P one of them is size-biased. Where the mean is far from 0, X is
    spread on a grid of equal cells, and the sum's law is a power of X's, by Fourier transform. Where it is not, for few steps
    or little noise, sums are made two by two, each spread on a grid that is finest where the law is.

    Args:
        sigma: σ.
        steps: k, at least 2.
        tail: how much of P's mass may be taken for infinite, and of Q's for 0, in all.

    Guarantee:
        (P, Q) with Q = N(0, σ²I) and P the mean of the N(e_j, σ²I) dominates the k steps in both directions: with Gaussian
        noise, what a step releases is made of one number, 1[j is the example's step] + σz, by scaling and by adding what
        does not depend on the example; also where the next step is chosen by what was released before. The law given here
        dominates that pair.

    Source: V. Feldman and M. Shenfeld, *Privacy amplification by random allocation* (arXiv 2502.08202), and L. Chua et al.,
    *Balls-and-Bins Sampling for DP-SGD* (arXiv 2412.16802), for the pair; the law of a sum of likelihood ratios as in
    *Efficient privacy loss accounting for subsampling and random allocation* (arXiv 2602.17284).
    """
    found = _by_power(sigma, steps, tail)
    return _by_halves(sigma, steps, tail) if found is None else found


def _by_power(sigma: float, steps: int, tail: float) -> RatioLaw | None:
    """By Fourier transform; ``None`` where equal cells are too coarse for what they have to hold."""
    if sigma < _LITTLE_NOISE:
        return None
    deviation = math.sqrt(math.expm1(1.0 / sigma**2))
    cell = deviation / _CELLS_IN_DEVIATION
    count = math.ceil(math.exp(0.5 / sigma**2 - float(ndtri(tail / 4.0)) / sigma) / cell) + 1
    if count > _MOST_CELLS:
        return None
    one = lognormal_law(sigma, np.arange(count + 1, dtype=np.float64) * cell)
    x = np.concatenate([[0.0], one.ratio])
    q, p = np.concatenate([[one.zero], one.without_it]), np.concatenate([[0.0], one.with_it])
    high, low = _reach(x, q, p, steps, tail / 4.0)
    first = math.floor((steps - low) / cell)
    size = scipy.fft.next_fast_len(max(count + 1, math.ceil((steps + high) / cell) - first + 1), real=True)
    if size > _MOST_CELLS or first < _CELLS_IN_DEVIATION:
        return None
    each, biased = scipy.fft.rfft(q, size), scipy.fft.rfft(p, size)
    others = each ** (steps - 1)
    rounding = ROUNDING * (steps + 32) * math.sqrt(2.0 * float(np.sum(np.abs(others) ** 2)))
    without_it, with_it = (
        np.maximum(np.roll(scipy.fft.irfft(others * law, size), -(first % size)), 0.0) for law in (each, biased)
    )
    ratio = np.arange(first, first + size, dtype=np.float64) * (cell / steps)
    return RatioLaw(ratio, with_it, without_it, one.infinite + tail / 4.0 + rounding, tail / 4.0 + rounding)


def _reach(x: FloatArray, q: FloatArray, p: FloatArray, steps: int, tail: float) -> tuple[float, float]:
    """How far the sum lies above its mean k at most under P, and below under Q, but for ``tail`` each (Chernoff)."""
    high = low = math.inf
    scale = float(np.max(x))
    deviation = math.sqrt(steps * float(np.sum(q * (x - 1.0) ** 2)))
    for tilt in np.geomspace(0.1 / deviation, 100.0 / min(scale, deviation), 32):
        up, shift = np.exp(tilt * (x - scale)), tilt * (scale - 1.0)
        grown, biased = float(np.sum(q * up)), float(np.sum(p * up))
        if grown > 0.0 and biased > 0.0:
            log_moment = (steps - 1) * (math.log(grown) + shift) + math.log(biased) + shift
            high = min(high, (log_moment - math.log(tail)) / tilt)
        least = float(x[np.argmax(q > 0.0)])
        down = steps * (math.log(float(np.sum(q * np.exp(-tilt * np.maximum(x - least, 0.0))))) + tilt * (1.0 - least))
        low = min(low, (down - math.log(tail)) / tilt)
    return max(high, 0.0), max(low, 0.0)


def _by_halves(sigma: float, steps: int, tail: float) -> RatioLaw:
    """Two by two: the law of twice as many steps from that of half, and one more where the number is odd."""
    reach, cut = -float(ndtri(tail / 8.0)) / sigma, tail / (8.0 * (2 * steps.bit_length() + 1))
    edges = np.exp(np.linspace(-0.5 / sigma**2 - reach, 0.5 / sigma**2 + reach, _POINTS))
    one = law = lognormal_law(sigma, edges)
    taken = 1
    for bit in bin(steps)[3:]:
        law, taken = _mean(law, taken, law, taken, cut), 2 * taken
        if bit == "1":
            law, taken = _mean(law, taken, one, 1, cut), taken + 1
    return law


def _mean(a: RatioLaw, of_a: int, b: RatioLaw, of_b: int, tail: float) -> RatioLaw:
    """The law of the mean of ``of_a + of_b`` independent ratios, given those of the means of two parts."""
    share = of_a / (of_a + of_b)
    mean, mass, zero = _means(a, b, share)
    edges = _finest_where_it_is(mean, mass, tail)
    place = np.clip(np.searchsorted(edges, mean, side="right") - 1, 0, len(edges) - 2)
    below, above = edges[place], edges[place + 1]
    up = np.clip((mean - below) / (above - below), 0.0, 1.0)
    on = binned(place, mass * (1.0 - up), len(edges)) + binned(place + 1, mass * up, len(edges))
    infinite = share * a.infinite + (1.0 - share) * b.infinite + float(np.sum(mass * np.maximum(mean - edges[-1], 0.0)))
    return RatioLaw(edges[1:], on[1:] * edges[1:], on[1:], infinite, zero + float(on[0]))


def _means(a: RatioLaw, b: RatioLaw, share: float) -> tuple[FloatArray, FloatArray, float]:
    """The mean of a ratio of each law, ``share`` of the first: spread on points above 0, and what is at 0.

    The points are the floating-point numbers of a few leading bits. So the place of a number among them is its leading bits,
    and how far it is on the way to the next point, which is what goes there to keep the mean, its other bits: both exactly,
    and quickly, for the million of pairs.
    """
    rows, columns = (np.concatenate([[0.0], law.ratio]) for law in (a, b))
    of_rows, of_columns = (np.concatenate([[law.zero], law.without_it]) for law in (a, b))
    rows, columns = share * rows, (1.0 - share) * columns
    lowest, highest = min(rows[1], columns[1]), rows[-1] + columns[-1]
    width = math.sqrt(min((share**2 * _variance(a) + (1.0 - share) ** 2 * _variance(b)), 1.0))
    room = _MOST_BITS - math.log2(math.log2(highest / lowest) + 2.0)
    bits = max(_FEWEST_BITS, min(math.ceil(math.log2(_CELLS_IN_WIDTH / max(width, 1e-9))), int(room)))
    shift = 52 - bits
    first, last = (int(np.float64(end).view(np.int64)) >> shift for end in (lowest, highest))
    on, up = np.zeros((2, last - first + 3))
    for start in range(0, len(rows), _ROWS):  # so few rows at a time that they stay in the cache
        from_column = start if a is b else 0
        mass = np.multiply.outer(of_rows[start : start + _ROWS], of_columns[from_column:])
        if a is b:
            mass[:, _ROWS:] *= 2.0  # the pairs the other way round
        mass = mass.ravel()
        mean = np.add.outer(rows[start : start + _ROWS], columns[from_column:]).ravel()
        if start == 0:
            mean[0], mass[0] = lowest, 0.0  # both are 0
        number = mean.view(np.int64)
        place = (number >> shift) - first
        on += binned(place, mass, len(on))
        up += binned(place, mass * (number & ((1 << shift) - 1)), len(on))
    up *= 2.0**-shift
    on -= up
    on[1:] += up[:-1]
    points = ((first + np.arange(len(on), dtype=np.int64)) << shift).view(np.float64)
    return points, np.maximum(on, 0.0), float(of_rows[0] * of_columns[0])


def _variance(law: RatioLaw) -> float:
    """Of a ratio under Q, whose mean is 1 but for what was cut off."""
    return law.zero + float(np.sum(law.without_it * np.minimum(np.abs(law.ratio - 1.0), 1e150) ** 2))


def binned(place: npt.NDArray[np.int64], mass: FloatArray, size: int) -> FloatArray:
    """The mass at each of ``size`` places."""
    return np.asarray(np.bincount(place, mass, size), dtype=np.float64)


def _finest_where_it_is(mean: FloatArray, mass: FloatArray, tail: float) -> FloatArray:
    """0, and points around 1 whose distance grows with that from 1, so far as Q has mass below and P above."""
    bins = np.linspace(math.log(float(np.min(mean))), math.log(float(np.max(mean))) + 1e-9, 4097)
    place = np.searchsorted(bins, np.log(mean), side="right") - 1
    below, above = binned(place, mass, 4096), binned(place, mass * mean, 4096)
    first = int(np.searchsorted(np.cumsum(below), tail))
    last = 4096 - int(np.searchsorted(np.cumsum(above[::-1]), tail))
    lowest, highest = math.exp(bins[min(first, 4095)]), math.exp(bins[max(last, 1)])
    width = math.sqrt(min(float(np.sum(mass * np.minimum(np.abs(mean - 1.0), 1e150) ** 2)), 1e300))
    if width >= 0.5 or not lowest < 1.0 < highest:
        points = np.geomspace(lowest, highest, _POINTS)
    else:
        ends = math.asinh((lowest - 1.0) / width), math.asinh((highest - 1.0) / width)
        points = 1.0 + width * np.sinh(np.linspace(*ends, _POINTS))
    points = points[points > 0.0]
    return np.concatenate([[0.0], points])
