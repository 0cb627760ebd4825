"""Exact samples of the discrete Gaussian, from uniform random words and integer arithmetic."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lightning_dp.mechanism.keystream import WORD_BITS, Keystream, LazyUniform, Words

Integers = npt.NDArray[np.int64]

SURE = 2.0**-32
"""A decision is left to exact arithmetic if floating point comes within this, relatively, of the other answer."""

_CHUNK = 2**16
_TINY = 2.0**-60
_LARGEST_SCALE = 2**52


def discrete_gaussian(variance: Fraction, count: int, stream: Keystream, *, sure: float = SURE) -> Integers:
    """``count`` independent samples of the discrete Gaussian: P[k] proportional to exp(-k²/2s²) over all integers k.

    A candidate for the size x of k is U + tV, with U uniform below the power of two t nearest to s, and V geometric,
    P[V ≥ v] = e⁻ᵛ; it gets a random sign. It is kept with probability exp(-U/t - (x - s²/t)²/2s²), and -0 never.
    Candidates have probability proportional to e⁻ⱽ, and V + U/t + (x - s²/t)²/2s² = x²/2s² + s²/2t², so what is kept has
    the law exactly. This is Algorithm 3 of Canonne, Kamath and Steinke with its two rejections made one.

    Exactness: every random choice compares a uniform real number with e⁻ᵞ for a rational γ. The comparison is done in
    floating point first, whose error is below 2⁻³⁸ relative to the threshold here. Only where threshold and number are
    closer than 2⁻³² relatively is it repeated with as many digits and random bits as it takes (:class:`LazyUniform`),
    which is about once in 10⁹ candidates. So the samples have the law itself, not an approximation of it.

    Args:
        variance: s², an exact positive number. (The variance proper is this, or a trifle less for s below 1.)
        count: how many.
        stream: uniform words. About 50 bytes are taken for each sample.
        sure: for tests: how close is too close. It changes who decides, never what is decided.

    Returns:
        ``(count,)`` int64.

    Raises:
        ValueError: s² is not positive, or s is above 2⁵².

    Example:
        >>> samples = discrete_gaussian(Fraction(9), 1000, Keystream(bytes(32)))
        >>> samples.dtype, bool(abs(samples.mean()) < 0.5), bool(8 < samples.var() < 10)
        (dtype('int64'), True, True)

    Source: C. L. Canonne, G. Kamath and T. Steinke 2020, *The discrete Gaussian for differential privacy*,
    arXiv 2004.00010, Algorithms 1 to 3.
    """
    if not 0 < variance <= _LARGEST_SCALE**2:
        raise ValueError(f"variance={float(variance):g}: expected a number above 0 and at most 2^104.")
    candidates = _Candidates(variance, stream, sure)
    kept: list[Integers] = []
    missing = count
    while missing > 0:
        samples = candidates.draw(min(_CHUNK, 64 + math.ceil(2.2 * missing)))[:missing]
        kept.append(samples)
        missing -= len(samples)
    return np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)


class _Candidates:
    """Rejection sampling for one s²: what is fixed, and a batch of candidates at a time."""

    def __init__(self, variance: Fraction, stream: Keystream, sure: float) -> None:
        self.variance, self.stream, self.sure = variance, stream, sure
        self.bits = max(0, round(math.log2(float(variance)) / 2))
        self.t = 2**self.bits

    def draw(self, count: int) -> Integers:
        first, second, third = self.stream.words(3 * count).reshape(3, count)
        u = (first >> np.uint64(WORD_BITS - self.bits)).astype(np.int64) if self.bits else np.zeros(count, np.int64)
        negative = (first & np.uint64(1)).astype(bool)
        v = self._geometric(second)
        size = u + v * self.t
        exponent = u / self.t + (size - float(self.variance / self.t)) ** 2 / float(2 * self.variance)
        keep = self._below_exp(third, exponent, u, size)
        keep &= ~(negative & (size == 0))
        samples: Integers = np.where(negative, -size, size)[keep]
        return samples

    def _geometric(self, words: Words) -> Integers:
        """V for each word: how many of e⁻¹, e⁻², ... its uniform number is below."""
        place = np.searchsorted(_POWERS, words)
        v = (len(_POWERS) - place).astype(np.int64)
        for index in np.flatnonzero((_POWERS.take(place, mode="clip") == words) | (words == 0)):
            number, v[index] = LazyUniform(int(words[index]), self.stream.spare), 0
            while number.below_exp(Fraction(int(v[index]) + 1)):
                v[index] += 1
        return v

    def _below_exp(
        self, words: Words, exponent: npt.NDArray[np.float64], u: Integers, size: Integers
    ) -> npt.NDArray[np.bool_]:
        """Whether each word's uniform number is below e to the minus exponent, the exact one."""
        number, threshold = words * 2.0**-WORD_BITS, np.exp(-exponent)
        below = number < threshold
        for index in np.flatnonzero(np.abs(number - threshold) <= self.sure * threshold + _TINY):
            exact = Fraction(int(u[index]), self.t)
            exact += (int(size[index]) - self.variance / self.t) ** 2 / (2 * self.variance)
            below[index] = LazyUniform(int(words[index]), self.stream.spare).below_exp(exact)
        return below


def _powers() -> Words:
    """⌊e⁻ᵏ·2⁶⁴⌋ for k = 1, 2, ... down to the last that is not 0, ascending."""
    with localcontext() as context:
        context.prec = 60
        scaled = [int(Decimal(-k).exp() * 2**WORD_BITS) for k in range(1, WORD_BITS)]
    return np.array(sorted(power for power in scaled if power), dtype=np.uint64)


_POWERS = _powers()
