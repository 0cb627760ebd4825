"""Privacy losses of any rounds, composed on one grid: bounds on ε at a δ, on δ at an ε, and on the whole curve.

Every law on the grid dominates its round (:mod:`lightning_dp.accounting.likelihood_ratio`), domination is kept by composition,
and what falls off a window or is rounded counts as lost. So ε is an upper bound at every grid; a finer one is tighter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from scipy.special import ndtri

from lightning_dp.accounting.likelihood_ratio import RatioLaw, allocation_law, binned, lognormal_law
from lightning_dp.accounting.losses import LossLaw, LossSum
from lightning_dp.accounting.mixture import apart
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.rdp import FloatArray

_TAIL_SHARE = 1e-4
"""The part of δ that may be lost for good, beyond all bounds."""
_CELLS_IN_DEVIATION = (60.0, 24.0)
"""How many cells of the grid a standard deviation has: at best, and where the grid would have more than many cells otherwise.
Spreading adds about 1/6·24² of the variance, so 0.02 % of ε."""
_MANY_CELLS, _MOST_CELLS = 2**17, 2**21
_FINEST, _COARSEST = 1e-10, 5e-3
_LARGEST_LOSS = 600.0
_AMPLIFIED = (0.1, 2000.0)
"""σ for which an allocation is worked out; beyond, it counts as if everybody knew the example's step."""
_CURVE_AT = (1e-5, 1e-11)
"""δ around which a whole curve is worked out."""


def pld_bound(phases: Sequence[Phase], delta: float) -> float:
    """Upper bound on ε of all ``phases`` composed, both directions.

    Args:
        phases: with noise, of any law.
        delta: δ, in (0, 1).

    Raises:
        PrvFailureError: δ is too small for double precision, or the losses are too large for a grid.

    Example:
        >>> round(pld_bound([Phase(3.0, 0.08192, 100)], 1e-5), 2)
        1.14
    """
    return max(pld_bounds(phases, delta))


def pld_bounds(phases: Sequence[Phase], delta: float) -> tuple[float, float]:
    """:func:`pld_bound` as the example is removed, and as it is added."""
    found = []
    for total in _both_ways(tuple(phases), _magnitude(delta)):
        tilt = total.tilt_for(delta)
        epsilon = total.deltas(tilt, _MOST_CELLS).inverse(delta)
        if not (epsilon < math.inf and total.likely(tilt, epsilon)):
            epsilon = min(epsilon, total.deltas(0.0, _MOST_CELLS).inverse(delta))
        if math.isinf(epsilon):
            raise PrvFailureError(f"δ = {delta:.3g} is too small for double precision")
        found.append(epsilon)
    removed, added = found
    return removed, added


def pld_delta(phases: Sequence[Phase], epsilon: float, precision: float = 1e-6) -> float:
    """Upper bound on δ of all ``phases`` composed at ``epsilon``, both directions; at ε = 0 it is the total variation distance.

    Args:
        phases: with noise, of any law; at least one round.
        epsilon: ε, at least 0.
        precision: roughly how much of it is spent on what is cut off and rounded.

    Raises:
        PrvFailureError: as of :func:`pld_bound`.
    """
    return max(
        float(_deltas(total, (precision,), np.array([epsilon]))[0])
        for total in _both_ways(tuple(phases), _magnitude(precision))
    )


def pld_curve(
    phases: Sequence[Phase], points: int, smallest: float = 1e-13
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """δ as an upper bound at many ε from 0 on, to where it is ``smallest``.

    Returns:
        ε, and δ as the example is removed and as it is added, each ``(points,)``.

    Raises:
        PrvFailureError: the losses are too large for a grid.
    """
    totals = _both_ways(tuple(phases), smallest)
    epsilon = np.linspace(0.0, max(total.cell + max(0.0, total.chernoff(smallest)) for total in totals), points)
    around = [delta for delta in _CURVE_AT if delta >= smallest]
    removed, added = (_deltas(total, around, epsilon) for total in totals)
    return epsilon, removed, added


def _deltas(total: LossSum, around: Sequence[float], epsilon: FloatArray) -> FloatArray:
    found = np.ones_like(epsilon)
    for tilt in (0.0, *(total.tilt_for(delta) for delta in around)):
        found = np.minimum(found, total.deltas(tilt, _MOST_CELLS).at(epsilon))
    return found


def _magnitude(delta: float) -> float:
    """A power of ten not above, so that laws are found again."""
    return float(10.0 ** math.floor(math.log10(delta)))


@lru_cache(maxsize=8)
def _both_ways(phases: tuple[Phase, ...], delta: float) -> tuple[LossSum, LossSum]:
    """The composed losses in both directions, for questions about a δ of this size."""
    phases = tuple(one for phase in phases for one in apart(phase, delta))
    rounds = sum(phase.steps for phase in phases)
    tail = _magnitude(_TAIL_SHARE * delta / rounds)
    ratios = [_ratio_law(phase, tail) for phase in phases]
    instead = [_poisson_law(*phase.seldom[1:], tail) if phase.seldom else None for phase in phases]
    counts = [phase.steps for phase in phases]
    variance = sum(n * _deviation(ratio) ** 2 for n, ratio in zip(counts, ratios, strict=True)) / rounds
    width = sum(float(np.log(ratio.ratio[-1]) - np.log(ratio.ratio[0])) for ratio in (*ratios, *filter(None, instead)))
    least = max(_FINEST, math.sqrt(variance))  # of a round, on average
    cell = max(min(_COARSEST, least / _CELLS_IN_DEVIATION[0]), width / _MOST_CELLS)
    while True:
        laws = [_laws(*one, cell) for one in zip(phases, ratios, instead, strict=True)]
        totals = [LossSum([law[way] for law in laws], counts, cell) for way in (0, 1)]
        size = 0.0
        for total in totals:
            low, high, _ = total.window(0.0)
            high = max(high, total.chernoff(delta))
            if not max(abs(low), abs(high)) <= _LARGEST_LOSS:
                raise PrvFailureError(f"the privacy loss may exceed {_LARGEST_LOSS:g}, beyond what a grid can hold")
            size = max(size, (high - low) / cell, sum(len(law[0].mass) for law in laws))
        coarser = min(_COARSEST, least / _CELLS_IN_DEVIATION[1])
        if size > _MANY_CELLS and cell < coarser:
            cell = min(coarser, cell * 1.05 * size / _MANY_CELLS)
        elif size > _MOST_CELLS:
            cell *= 1.05 * size / _MOST_CELLS
        else:
            return totals[0], totals[1]


def _laws(phase: Phase, usual: RatioLaw, instead: RatioLaw | None, cell: float) -> tuple[LossLaw, LossLaw]:
    removed, added = _on_losses(usual, cell)
    if phase.seldom is None or instead is None:
        return removed, added
    others = _on_losses(instead, cell)
    return removed.mixed(others[0], phase.seldom.probability), added.mixed(others[1], phase.seldom.probability)


def _ratio_law(phase: Phase, tail: float) -> RatioLaw:
    sigma, q = phase.noise_multiplier, phase.sampling_probability
    if phase.law not in ("poisson", "allocation"):
        raise PrvFailureError(f"there is no law of likelihood ratios for {phase.law!r}")
    if phase.law == "allocation" and q < 1.0:
        if _AMPLIFIED[0] <= sigma <= _AMPLIFIED[1]:
            return allocation_law(sigma, round(1.0 / q), tail)
        q = 1.0
    return _poisson_law(sigma, q, tail)


@lru_cache(maxsize=64)
def _poisson_law(sigma: float, q: float, tail: float) -> RatioLaw:
    """On points that are dense enough for every grid of losses."""
    reach = -float(ndtri(tail / 4.0)) / sigma
    if 0.5 / sigma**2 + reach > _LARGEST_LOSS:
        raise PrvFailureError(f"the privacy loss may exceed {_LARGEST_LOSS:g}, beyond what a grid can hold")
    x = np.exp(np.linspace(-0.5 / sigma**2 - reach, 0.5 / sigma**2 + reach, 20_001))
    return lognormal_law(sigma, np.unique(1.0 - q + q * x), q)


def _deviation(law: RatioLaw) -> float:
    loss = np.log(law.ratio)
    mean = float(np.sum(law.without_it * loss))
    return math.sqrt(max(float(np.sum(law.without_it * (loss - mean) ** 2)), 1e-300))


def _on_losses(law: RatioLaw, cell: float) -> tuple[LossLaw, LossLaw]:
    """The law on a grid of losses, spread with its mean kept: as the example is removed, and as it is added."""
    loss = np.log(law.ratio) / cell
    first, last = math.floor(float(loss[0])), math.floor(float(loss[-1])) + 1
    place = np.floor(loss).astype(np.int64)
    up = np.clip(np.expm1((loss - place) * cell) / math.expm1(cell), 0.0, 1.0)
    place, size = place - first, last - first + 1
    without_it = binned(place, law.without_it * (1.0 - up), size) + binned(place + 1, law.without_it * up, size)
    biased = up * np.exp(cell * (first + place + 1 - loss))  # of P's mass, which the ratio weighs
    biased = np.clip(biased, 0.0, 1.0)
    with_it = binned(place, law.with_it * (1.0 - biased), size) + binned(place + 1, law.with_it * biased, size)
    return LossLaw(first, with_it, law.infinite), LossLaw(-last, without_it[::-1], law.zero)
