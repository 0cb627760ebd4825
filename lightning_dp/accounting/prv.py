"""Privacy random variables on a grid: the tight accountant, by Fourier transform, for both directions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.special import ndtr

from lightning_dp.accounting.grid import Grid, discretised
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.rdp import FloatArray, privacy_loss, rdp_epsilon

EPSILON_ERROR = 0.01
"""The discretisation error in ε that the upper bound includes, unless the grid would be too large."""

_DELTA_SHARE = 1e-3
"""The part of δ set aside for the tails that the grid cuts off."""

_MAX_GRID = 2**22
_MAX_REFINED_GRID = 2**19
_MAX_LOSS = 500.0
_NEGLIGIBLE_LOG = -60.0
_ROUNDING = 32 * 2.0**-52


class PrvFailureError(RuntimeError):
    """The PRV accountant cannot give a trustworthy number here; the message says why, in words."""


@dataclass(frozen=True)
class PrivacyLossVariable:
    """The privacy loss of one step, cut to [``t_min``, ``t_max``]: a :class:`~lightning_dp.accounting.grid.Loss`.

    Args:
        noise_multiplier: σ > 0.
        sampling_probability: q in (0, 1].
        adding: False for the loss of the output *with* the example against without it, True for the reverse.
        t_min: lower cut of the loss.
        t_max: upper cut of the loss.
    """

    noise_multiplier: float
    sampling_probability: float
    adding: bool
    t_min: float
    t_max: float

    def _output_at(self, loss: FloatArray) -> FloatArray:
        """The output x at which L(x) = ``loss``; -inf below log(1 - q), the smallest loss there is."""
        q = self.sampling_probability
        with np.errstate(divide="ignore"):
            # exp(loss) = 1 - q + q·exp(z): each form is exact to rounding of `loss` itself where it is used.
            near = np.log1p(np.maximum(np.expm1(loss) / q, -1.0))
            far = np.log(np.maximum(np.exp(np.minimum(loss, 0.0)) - (1.0 - q), 0.0) / q)
        z = np.where(loss > -0.5, near, far)
        return self.noise_multiplier**2 * z + 0.5

    def _tails(self, loss: FloatArray) -> tuple[FloatArray, FloatArray]:
        """P(loss variable <= ``loss``) and P(loss variable > ``loss``), each exact in its own tail."""
        sigma, q = self.noise_multiplier, self.sampling_probability
        if self.adding:
            u = self._output_at(-loss) / sigma
            return ndtr(-u), ndtr(u)
        x = self._output_at(loss)
        u, v = x / sigma, (x - 1.0) / sigma
        return (1.0 - q) * ndtr(u) + q * ndtr(v), (1.0 - q) * ndtr(-u) + q * ndtr(-v)

    def _mass(self, edges: FloatArray) -> FloatArray:
        below, above = self._tails(edges)
        mass: FloatArray = np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))
        return mass

    def probability(self, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> FloatArray:
        """P(left < loss <= right) of adjoining cells, given that the loss is within the cuts."""
        edges = np.append(left, right[-1]).astype(np.float64)
        total = self._mass(np.array([self.t_min, self.t_max]))[0]
        share: FloatArray = self._mass(np.clip(edges, self.t_min, self.t_max)) / total
        return share

    def mean(self) -> float:
        """The mean of the cut loss, by Gauss-Legendre panels over the mechanism's output."""
        sigma, q = self.noise_multiplier, self.sampling_probability
        ends = np.sort(self._output_at(np.array([self.t_min, self.t_max]) * (-1.0 if self.adding else 1.0)))
        low, high = max(ends[0], -13.0 * sigma), min(ends[1], (0.0 if self.adding else 1.0) + 13.0 * sigma)
        panels = max(1, math.ceil((high - low) / min(sigma, sigma**2)))
        nodes, weights = np.polynomial.legendre.leggauss(16)
        edges = np.linspace(low, high, panels + 1)
        half = np.diff(edges)[:, None] / 2.0
        x = edges[:-1, None] + half * (nodes + 1.0)
        density = np.exp(-0.5 * (x / sigma) ** 2)
        if not self.adding:
            density = (1.0 - q) * density + q * np.exp(-0.5 * ((x - 1.0) / sigma) ** 2)
        density = density * half * weights
        loss = privacy_loss(x, sigma, q)
        return float(np.sum(density * (-loss if self.adding else loss)) / np.sum(density))


@dataclass(frozen=True)
class _Spectrum:
    """One direction: logarithms of the Fourier coefficients, and the grid's offset from 0 in units of ε."""

    history: npt.NDArray[np.complex128]
    history_offset: float
    step: npt.NDArray[np.complex128]
    step_offset: float


class PrvGrid:
    """ε of ``history`` followed by up to ``max_steps`` steps of one mechanism, from one discretisation.

    The error theorem of Gopi, Lee and Wutschitz (2021, Theorem 5.5) holds for each direction of
    add/remove-one separately; the larger of the two is reported, so nothing rests on one direction dominating
    the other. Sums run in double precision, and the rounding they can cause is taken off δ, so ``upper``
    stays a bound.

    Args:
        history: phases already spent, each with noise.
        noise_multiplier: σ > 0 of the steps to come.
        sampling_probability: q of the steps to come.
        delta: δ in (0, 1).
        max_steps: the most steps of the current mechanism that will be asked for.
        epsilon_error: wanted discretisation error; it is made finer for ε below 1 and coarser if memory
            demands.

    Raises:
        PrvFailureError: the grid cannot hold this loss, or its numbers are not trustworthy.
    """

    def __init__(
        self,
        history: Sequence[Phase],
        noise_multiplier: float,
        sampling_probability: float,
        delta: float,
        max_steps: int,
        epsilon_error: float = EPSILON_ERROR,
    ) -> None:
        current = Phase(noise_multiplier, sampling_probability, max_steps)
        self._delta = delta
        self._history_steps = sum(phase.steps for phase in history)
        self.max_steps = max_steps
        total = self._history_steps + max_steps
        delta_error = _DELTA_SHARE * delta
        largest_loss = self._largest_loss([*history, current], delta_error, total)
        if largest_loss > _MAX_LOSS:
            raise PrvFailureError(f"the privacy loss may exceed {_MAX_LOSS:g}, beyond what PRV's grid can hold")
        # Cells per unit of loss and of 1 / epsilon_error: Gopi, Lee and Wutschitz (2021), Theorem 5.5.
        density = math.sqrt(total / 2.0 * math.log(12.0 / delta_error))
        cells = 2.0 * largest_loss * density
        refined = max(epsilon_error * min(1.0, rdp_epsilon([*history, current], delta)), cells / _MAX_REFINED_GRID)
        self.epsilon_error = max(min(epsilon_error, refined), cells / _MAX_GRID)
        self._cell = self.epsilon_error / density
        half = math.ceil(largest_loss / self._cell)
        self._size = scipy.fft.next_fast_len(half, real=True) * 2
        low = -(self._size // 2) * self._cell
        self._grid = Grid(low, low + (self._size - 1) * self._cell, self._size)
        try:
            # numpy keeps errstate for each thread; what warnings do is one setting for the whole process.
            with np.errstate(all="raise", under="ignore"):
                self._spectra = [self._transform(history, current, adding) for adding in (False, True)]
        except (ArithmeticError, ValueError, RuntimeError) as error:
            raise PrvFailureError(f"PRV's discretisation failed ({error})") from error

    @staticmethod
    def _largest_loss(phases: Sequence[Phase], delta_error: float, total: int) -> float:
        """Half the grid's width: Gopi, Lee and Wutschitz (2021), Remark 5.6."""
        composed = rdp_epsilon(phases, delta_error / 4.0)
        single = max(
            rdp_epsilon([Phase(phase.noise_multiplier, phase.sampling_probability, 1)], delta_error / 8.0 / total)
            for phase in phases
        )
        return max(composed, single) + 3.0

    def _transform(self, history: Sequence[Phase], current: Phase, adding: bool) -> _Spectrum:
        before = np.zeros(self._size // 2 + 1, dtype=np.complex128)
        offset = 0.0
        for phase in history:
            log_spectrum, shift = self._log_spectrum(phase, adding)
            before += phase.steps * log_spectrum
            offset += phase.steps * shift
        step, step_offset = self._log_spectrum(current, adding)
        return _Spectrum(before, offset, step, step_offset)

    def _log_spectrum(self, phase: Phase, adding: bool) -> tuple[npt.NDArray[np.complex128], float]:
        loss = PrivacyLossVariable(
            phase.noise_multiplier,
            phase.sampling_probability,
            adding,
            self._grid.first,
            self._grid.end,
        )
        mass, shift = discretised(loss, self._grid)
        spectrum = scipy.fft.rfft(np.fft.ifftshift(mass))
        if not np.isfinite(spectrum).all():  # compiled code reports nothing to numpy
            raise ArithmeticError("the Fourier transform is not finite")
        magnitude = np.maximum(np.abs(spectrum), np.finfo(np.float64).tiny)
        return np.log(magnitude) + 1j * np.angle(spectrum), shift

    def epsilon(self, steps: int) -> tuple[float, float]:
        """The estimate of ε after ``steps`` steps of the current mechanism, and its upper bound.

        Raises:
            PrvFailureError: rounding would outweigh δ, or a number came out that cannot be right.
        """
        estimate = 0.0
        for spectrum in self._spectra:
            with np.errstate(all="ignore"):
                value = self._epsilon_of(spectrum, steps)
            if not (math.isfinite(value) and value >= 0.0):
                raise PrvFailureError(f"PRV gave ε = {value}")
            estimate = max(estimate, value)
        return estimate, estimate + self.epsilon_error

    def _epsilon_of(self, spectrum: _Spectrum, steps: int) -> float:
        exponent = spectrum.history.real + steps * spectrum.step.real
        kept = np.flatnonzero(exponent > _NEGLIGIBLE_LOG)
        composed = np.zeros_like(spectrum.step)
        composed[kept] = np.exp(exponent[kept] + 1j * (spectrum.history.imag[kept] + steps * spectrum.step.imag[kept]))
        rounding = _ROUNDING * (self._history_steps + steps) * math.sqrt(2.0 * float(np.sum(np.abs(composed) ** 2)))
        target = self._delta * (1.0 - _DELTA_SHARE) - rounding
        if target < self._delta / 2.0:
            raise PrvFailureError(
                f"δ = {self._delta:.3g} is too small for double precision after {self._history_steps + steps} steps"
            )
        pmf: FloatArray = np.fft.fftshift(np.asarray(scipy.fft.irfft(composed, self._size), dtype=np.float64))
        total = float(np.sum(pmf))
        if not abs(total - 1.0) < 1e-6:
            raise PrvFailureError(f"PRV's composed probabilities sum to {total}, not 1")
        offset = spectrum.history_offset + steps * spectrum.step_offset
        start = min(max(self._size // 2 - math.ceil(offset / self._cell) - 1, 0), self._size - 1)
        t = np.arange(start - self._size // 2, self._size - self._size // 2, dtype=np.float64)
        return invert(np.asarray(t * self._cell + offset, dtype=np.float64), pmf[start:], target)


def invert(t: FloatArray, pmf: FloatArray, delta: float) -> float:
    """The smallest ε >= 0 with Σ pmf·(1 - exp(ε - t))₊ <= ``delta`` (Gopi et al. 2021, eq. 1)."""
    mass = np.cumsum(pmf[::-1])[::-1]
    tilted = np.cumsum((pmf * np.exp(-t))[::-1])[::-1]
    above = np.flatnonzero(mass - np.exp(t) * tilted > delta)
    if above.size == 0:
        return 0.0
    i = int(above[-1]) + 1
    if i >= t.size:
        raise PrvFailureError("PRV's grid ends before δ is reached")
    between = math.log((mass[i] - delta) / tilted[i]) if mass[i] > delta and tilted[i] > 0 else float(t[i])
    return max(0.0, min(max(between, float(t[i - 1])), float(t[i])))
