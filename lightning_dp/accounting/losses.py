"""Sums of privacy losses on one grid, by Fourier transform: δ at every ε, in one direction, as an upper bound.

The transform's rounding is about 1e-16 of the largest probability, and δ may be far smaller. So the laws are tilted first: with
every probability multiplied by e^(θ·loss) and the whole divided by its sum, the losses that decide δ(ε) at one ε are the likely
ones, and what is rounded is small beside δ itself. Exponential tilting commutes with composition, so nothing else changes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.fft

from lightning_dp.accounting.likelihood_ratio import ROUNDING, binned
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.rdp import FloatArray

_NEGLIGIBLE = 1e-18
_BINS = 32.0
_LARGEST_EXPONENT = 300.0
_LARGEST_EPSILON = 700.0
"""e^ε of more is no number."""


@dataclass(frozen=True)
class LossLaw:
    """Losses of one round in one direction: ``mass[i]`` at (``first`` + i) cells, and what is beyond all bounds."""

    first: int
    mass: FloatArray
    infinite: float

    def mixed(self, other: LossLaw, probability: float) -> LossLaw:
        """The law of a round that is as ``other`` says with this probability, where everybody sees which of the two it is."""
        first = min(self.first, other.first)
        size = max(self.first + len(self.mass), other.first + len(other.mass)) - first
        mass = np.zeros(size)
        for law, share in ((self, 1.0 - probability), (other, probability)):
            mass[law.first - first : law.first - first + len(law.mass)] += share * law.mass
        return LossLaw(first, mass, (1.0 - probability) * self.infinite + probability * other.infinite)


@dataclass(frozen=True)
class Deltas:
    """δ as an upper bound at ascending ε; in between at most what lies on the chord in e^ε, and beyond at most the last."""

    epsilon: FloatArray
    delta: FloatArray

    def at(self, epsilon: FloatArray) -> FloatArray:
        """Upper bounds at other ε; 1 below the first."""
        kept = self.epsilon <= _LARGEST_EPSILON  # beyond, δ is at most what it is there
        at, known = np.minimum(epsilon, _LARGEST_EPSILON), np.expm1(self.epsilon[kept])
        found = np.interp(np.expm1(at), known, self.delta[kept], left=1.0) if len(known) else np.ones_like(at)
        return np.asarray(found, dtype=np.float64)

    def inverse(self, delta: float) -> float:
        """The smallest ε ≥ 0 known to have this δ; ``inf`` if there is none here."""
        holds = np.flatnonzero(self.delta > delta)
        i = int(holds[-1]) + 1 if holds.size else 0
        if i == len(self.delta):
            return math.inf
        if i == 0 or self.epsilon[i] <= 0.0:
            return max(0.0, float(self.epsilon[i]))
        low, high = max(0.0, float(self.epsilon[i - 1])), float(self.epsilon[i])
        above, below = float(self.at(np.array([low]))[0]), float(self.delta[i])
        if above <= delta:
            return low
        share = (above - delta) / (above - below)
        return min(high, low + math.log1p(share * math.expm1(high - low)) * (1.0 + 1e-12))


class LossSum:
    """The sum of independent losses in one direction.

    Args:
        laws: of one round each, on one grid.
        counts: how many such rounds.
        cell: the grid's step, in ε.
    """

    def __init__(self, laws: Sequence[LossLaw], counts: Sequence[int], cell: float) -> None:
        self.cell, self._counts = cell, list(counts)
        self._laws = list(laws)
        self._losses = [(law.first + np.arange(len(law.mass))) * cell for law in laws]
        self.rounds = sum(counts)
        lost = sum(n * math.log1p(-min(law.infinite, 1.0 - 1e-12)) for law, n in zip(laws, counts, strict=True))
        self.infinite = -math.expm1(lost)
        """Probability of a loss beyond all bounds."""

    def log_moment(self, tilt: float) -> float:
        """K(θ) = log E[e^(θ·loss)] of the sum."""
        return sum(n * one for n, (_, one) in zip(self._counts, self._tilted(tilt), strict=True))

    def _tilted(self, tilt: float) -> Iterator[tuple[FloatArray, float]]:
        for law, loss in zip(self._laws, self._losses, strict=True):
            exponent = tilt * loss
            top = float(np.max(exponent[law.mass > 0.0]))
            mass = law.mass * np.exp(np.minimum(exponent - top, 0.0))
            total = float(np.sum(mass))
            yield mass / total, top + math.log(total)

    @cached_property
    def _rough(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Counts, losses and log masses with cells put together, the more the further from the mean: for guesses."""
        losses, masses = [], []
        for law, loss in zip(self._laws, self._losses, strict=True):
            total = float(np.sum(law.mass))
            mean = float(np.sum(law.mass * loss)) / total
            spread = math.sqrt(float(np.sum(law.mass * (loss - mean) ** 2)) / total) + self.cell
            place = np.floor(_BINS * np.arcsinh((loss - mean) / spread)).astype(np.int64)
            place -= place[0]
            mass, weighed = binned(place, law.mass, place[-1] + 1), binned(place, law.mass * loss, place[-1] + 1)
            kept = mass > 0.0
            losses.append(weighed[kept] / mass[kept])
            masses.append(np.log(mass[kept]))
        shape = len(masses), max(map(len, masses))
        loss, log_mass = np.zeros(shape), np.full(shape, -np.inf)
        for row, (at, one) in enumerate(zip(losses, masses, strict=True)):
            loss[row, : len(at)], log_mass[row, : len(one)] = at, one
        return np.asarray(self._counts, dtype=np.float64), loss, log_mass

    def _guess(self, tilt: float) -> tuple[float, float, float]:
        """About K, K′ and K″."""
        counts, loss, log_mass = self._rough
        exponent = tilt * loss + log_mass
        top = np.max(exponent, axis=1, keepdims=True)
        weight = np.exp(exponent - top)
        total = np.sum(weight, axis=1)
        centre = np.sum(weight * loss, axis=1) / total
        variance = np.sum(weight * (loss - centre[:, None]) ** 2, axis=1) / total
        return float(counts @ (top[:, 0] + np.log(total))), float(counts @ centre), float(counts @ variance)

    def tilt_for(self, delta: float) -> float:
        """The θ for which the losses are likely that decide where δ(ε) is ``delta``: θK′(θ) − K(θ) = −log δ, about."""
        low, high = math.log(1e-6 / max(self.cell, 1e-300) / len(self._losses[0])), math.log(1.0 / self.cell)
        low = min(low, high - 1.0, math.log(1e-3))
        for _ in range(24):
            middle = (low + high) / 2.0
            tilt = math.exp(middle)
            value, mean, _variance = self._guess(tilt)
            if tilt * mean - value < -math.log(delta):
                low = middle
            else:
                high = middle
        return math.exp(low)

    def chernoff(self, delta: float) -> float:
        """A loss that is exceeded with probability at most ``delta``, but for what is infinite."""
        tilt = self.tilt_for(delta)
        return (self.log_moment(tilt) - math.log(delta)) / tilt

    def likely(self, tilt: float, epsilon: float) -> bool:
        """Whether ``epsilon`` is well within the losses of the tilted sum, and above 0 by more than these spread."""
        _, mean, variance = self._guess(tilt)
        return epsilon > max(3.0 * math.sqrt(variance), mean - 6.0 * math.sqrt(variance))

    def window(self, tilt: float) -> tuple[float, float, float]:
        """Between which losses the tilted sum is, nearly; and how much of it may lie above, surely."""
        value, mean, variance = self._guess(tilt)
        spread = math.sqrt(max(variance, self.cell**2))
        log_tail, ends = math.log(_NEGLIGIBLE), []
        for sign in (-1.0, 1.0):
            best, at = math.inf, 0.0
            for step in np.geomspace(0.3, 60.0, 16) / spread:
                bound = (self._guess(tilt + sign * step)[0] - value - log_tail) / step
                if bound < best:
                    best, at = bound, float(step)
            ends.append((sign * best, at))
        (low, _), (high, step) = ends
        low, high = min(low, mean - 3.0 * spread) - self.cell, max(high, mean + 3.0 * spread) + self.cell
        above = self.log_moment(tilt + step) - self.log_moment(tilt) - step * high
        return low, high, math.exp(min(above, 0.0))

    def deltas(self, tilt: float, most_cells: int) -> Deltas:
        """δ(ε) for ε around the mean of the tilted sum.

        Args:
            tilt: θ, at least 0. Any gives an upper bound; the better it fits, the tighter.
            most_cells: of the window, which is cut from below to this.

        Raises:
            PrvFailureError: a number came out that cannot be right.
        """
        low, high, above = self.window(tilt)
        first = max(math.floor(low / self.cell), math.ceil(high / self.cell) - most_cells)
        size = scipy.fft.next_fast_len(math.ceil(high / self.cell) - first + 2, real=True)
        exponent, log_moment = np.zeros(size // 2 + 1, dtype=np.complex128), 0.0
        for law, count, (mass, one) in zip(self._laws, self._counts, self._tilted(tilt), strict=True):
            spectrum = scipy.fft.rfft(binned((law.first + np.arange(len(mass))) % size, mass, size))
            magnitude = np.maximum(np.abs(spectrum), np.finfo(np.float64).tiny)
            exponent += count * (np.log(magnitude) + 1j * np.angle(spectrum))
            log_moment += count * one
        composed = np.exp(exponent)
        lost = above + ROUNDING * (self.rounds + 32) * math.sqrt(2.0 * float(np.sum(np.abs(composed) ** 2)))
        mass = np.maximum(np.roll(scipy.fft.irfft(composed, size), -(first % size)), 0.0)
        total = float(np.sum(mass))
        if not (abs(total - 1.0) < 1e-6 and math.isfinite(log_moment) and math.isfinite(lost)):
            raise PrvFailureError(f"composed probabilities sum to {total}, not 1")
        loss = np.arange(first, first + size, dtype=np.float64) * self.cell
        # With A(ε) = e^(K − θε): P[loss > l_j] = A(l_j)·tail_j and δ(l_j) = A(l_j)·excess_j, summed up of positive numbers.
        tail = np.append(decayed(mass, tilt * self.cell)[1:], 0.0) * math.exp(-tilt * self.cell)
        excess = -math.expm1(-self.cell) * decayed(tail, (tilt + 1.0) * self.cell)
        log_scale = log_moment - tilt * loss
        scale = np.exp(np.minimum(log_scale, _LARGEST_EXPONENT))
        delta = scale * (excess + lost * math.exp(tilt * self.cell)) + self.infinite
        return Deltas(loss, np.where(log_scale > _LARGEST_EXPONENT, 1.0, np.minimum(delta, 1.0)))


def decayed(x: FloatArray, rate: float) -> FloatArray:
    """``y[j] = x[j] + e^(-rate)·y[j + 1]``, summed from the end.

    Example:
        >>> decayed(np.array([1.0, 2.0, 4.0]), math.log(2.0)).tolist()
        [3.0, 4.0, 4.0]
    """
    y = np.empty_like(x)
    block = max(1, int(min(len(x), _LARGEST_EXPONENT / rate)) if rate > 0.0 else len(x))
    carried = 0.0
    for end in range(len(x), 0, -block):
        start = max(0, end - block)
        weight = np.exp(-rate * np.arange(end - start))
        y[start:end] = (np.cumsum((x[start:end] * weight)[::-1])[::-1]) / weight
        y[start:end] += carried * np.exp(-rate * np.arange(end - start, 0, -1))
        carried = float(y[start])
    return y
