"""Privacy loss distributions of any rounds, composed on one grid of losses: for what PRV's theorem does not cover.

Every law on the grid dominates its round (:mod:`lightning_dp.accounting.likelihood_ratio`), domination is kept by composition,
and what falls off a window or is rounded counts as lost. So ε is an upper bound at every grid; a finer one is tighter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft
from scipy.special import ndtri

from lightning_dp.accounting.likelihood_ratio import ROUNDING, RatioLaw, allocation_law, binned, lognormal_law
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.prv import PrvFailureError, invert
from lightning_dp.accounting.rdp import FloatArray

_TAIL_SHARE = 2e-3
"""The part of δ that each of the tails may cost which are cut off."""
_CELLS_IN_DEVIATION, _MOST_CELLS = 30.0, 2**21
_FINEST, _COARSEST = 1e-6, 5e-3
_LARGEST_LOSS = 600.0
_AMPLIFIED = (0.05, 2000.0)
"""σ for which an allocation is worked out; beyond, it counts as if everybody knew the example's step."""


@dataclass(frozen=True)
class _LossLaw:
    """Losses of one round in one direction: ``mass[i]`` at (``first`` + i) cells, and what is beyond all bounds."""

    first: int
    mass: FloatArray
    infinite: float


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
    return max(_epsilon(composed, delta) for composed in _both_ways(phases, delta))


def pld_delta(phases: Sequence[Phase], epsilon: float, precision: float = 1e-6) -> float:
    """Upper bound on δ of all ``phases`` composed at ``epsilon``, both directions; at ε = 0 it is the total variation distance.

    Args:
        phases: with noise, of any law; at least one round.
        epsilon: ε, at least 0.
        precision: roughly how much of it is spent on what is cut off and rounded.

    Raises:
        PrvFailureError: as of :func:`pld_bound`.
    """
    found = []
    for losses, mass, lost in _both_ways(phases, precision):
        found.append(lost + float(np.sum(mass * -np.expm1(np.minimum(epsilon - losses, 0.0)))))
    return min(1.0, max(found))


_Composed = tuple[FloatArray, FloatArray, float]
"""Losses in ascending order, their mass, and what is lost for good: beyond all bounds, cut off or rounded."""


def _both_ways(phases: Sequence[Phase], delta: float) -> list[_Composed]:
    """The composed losses in both directions, for questions about a δ of this size."""
    rounds = sum(phase.steps for phase in phases)
    tail = 10.0 ** math.floor(math.log10(_TAIL_SHARE * delta / rounds))  # a power of ten, so that laws are found again
    ratios = [_ratio_law(phase.noise_multiplier, phase.sampling_probability, phase.law, tail) for phase in phases]
    cell = min(_COARSEST, max(_FINEST, min(map(_deviation, ratios)) / _CELLS_IN_DEVIATION))
    counts = [phase.steps for phase in phases]
    while True:
        laws = [_on_losses(ratio, cell) for ratio in ratios]
        windows = [_window([law[way] for law in laws], counts, cell, _TAIL_SHARE * delta) for way in (0, 1)]
        size = max(high - low for low, high in windows) / cell
        if not max(abs(end) for window in windows for end in window) <= _LARGEST_LOSS:
            raise PrvFailureError(f"the privacy loss may exceed {_LARGEST_LOSS:g}, beyond what a grid can hold")
        if size <= _MOST_CELLS:
            break
        cell *= 1.1 * size / _MOST_CELLS
    return [_compose([law[way] for law in laws], counts, cell, windows[way], delta) for way in (0, 1)]


def _ratio_law(sigma: float, q: float, law: str, tail: float) -> RatioLaw:
    if law == "allocation" and q < 1.0:
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
    return lognormal_law(sigma, np.concatenate([[1.0 - q], 1.0 - q + q * x]) if q < 1.0 else x, q)


def _deviation(law: RatioLaw) -> float:
    loss = np.log(law.ratio)
    mean = float(np.sum(law.without_it * loss))
    return math.sqrt(max(float(np.sum(law.without_it * (loss - mean) ** 2)), 1e-300))


def _on_losses(law: RatioLaw, cell: float) -> tuple[_LossLaw, _LossLaw]:
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
    return _LossLaw(first, with_it, law.infinite), _LossLaw(-last, without_it[::-1], law.zero)


def _window(laws: Sequence[_LossLaw], counts: Sequence[int], cell: float, tail: float) -> tuple[float, float]:
    """Between which losses the sum is but for ``tail`` above, and as much below (Chernoff)."""
    losses = [(law.first + np.arange(len(law.mass))) * cell for law in laws]
    spread = math.sqrt(sum(n * float(np.sum(law.mass * x**2)) for law, n, x in zip(laws, counts, losses, strict=True)))
    ends = []
    for sign in (-1.0, 1.0):
        best = math.inf
        for tilt in np.geomspace(1e-2 / max(spread, cell), 1e3 / max(min(spread, 1.0), cell), 40):
            total = 0.0
            for law, count, loss in zip(laws, counts, losses, strict=True):
                exponent = sign * tilt * loss
                top = float(np.max(exponent))
                total += count * (top + math.log(float(np.sum(law.mass * np.exp(exponent - top)))))
            best = min(best, (total - math.log(tail)) / tilt)
        ends.append(sign * best)
    return ends[0], ends[1]


def _compose(
    laws: Sequence[_LossLaw], counts: Sequence[int], cell: float, window: tuple[float, float], delta: float
) -> _Composed:
    first = math.floor(window[0] / cell) - 1
    size = scipy.fft.next_fast_len(math.ceil(window[1] / cell) - first + 2, real=True)
    exponent = np.zeros(size // 2 + 1, dtype=np.complex128)
    lost = _TAIL_SHARE * delta
    for law, count in zip(laws, counts, strict=True):
        wrapped = binned((law.first + np.arange(len(law.mass))) % size, law.mass, size)
        spectrum = scipy.fft.rfft(wrapped)
        magnitude = np.maximum(np.abs(spectrum), np.finfo(np.float64).tiny)
        exponent += count * (np.log(magnitude) + 1j * np.angle(spectrum))
        lost -= math.expm1(count * math.log1p(-min(law.infinite, 1.0 - 1e-12)))
    composed = np.exp(exponent)
    lost += ROUNDING * (sum(counts) + 32) * math.sqrt(2.0 * float(np.sum(np.abs(composed) ** 2)))
    mass = np.roll(scipy.fft.irfft(composed, size), -(first % size))
    return np.arange(first, first + size, dtype=np.float64) * cell, np.maximum(mass, 0.0), lost


def _epsilon(composed: _Composed, delta: float) -> float:
    losses, mass, lost = composed
    if lost > delta / 2.0:
        raise PrvFailureError(f"δ = {delta:.3g} is too small for double precision")
    kept = losses > -1.0
    return invert(losses[kept], mass[kept], delta - lost) if kept.any() else 0.0
