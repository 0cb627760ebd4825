"""The discrete Gaussian noise of one step, on integers, and the way back to floats."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from lightning_dp.mechanism.discrete_gaussian import discrete_gaussian
from lightning_dp.mechanism.grid import shaped_like
from lightning_dp.mechanism.keystream import Keystream
from lightning_dp.mechanism.noise import BLOCK, Parts, in_blocks
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.state import MechanismState


@dataclass(frozen=True)
class DiscreteNoise:
    """An exact discrete Gaussian on integers: a :class:`~lightning_dp.mechanism.noise.Noise`.

    What leaves the integers after it (the factor C/ΔB, and floating point) is post-processing. So would be a sum that wraps
    around at 2⁶³, although a plan that could come near it is refused.

    Args:
        variance: (σΔ)², exactly.
        unit: C/Δ, the length of a unit of the grid.
        coordinates: the most that get noise.

    Guarantee:
        The Gaussian mechanism with noise multiplier σ on a sum of sensitivity C, but for the divergence of discrete from
        rounded Gaussian noise, which the ledger counts (:func:`lightning_dp.accounting.slack.discretisation_divergence`).
    """

    variance: Fraction
    unit: float
    coordinates: int

    def block(self, device: torch.device) -> int:
        """See :class:`~lightning_dp.mechanism.noise.Noise`; the noise is drawn on the CPU."""
        return BLOCK

    def add(
        self, parts: Parts, coordinates: int, *, key: RandomKey, step: int, state: MechanismState
    ) -> MechanismState:
        """:func:`add_discrete_noise`, which leaves nothing to the next step.

        Raises:
            RuntimeError: there are more coordinates than the plan accounts for.
        """
        if coordinates > self.coordinates:
            raise RuntimeError(
                f"{coordinates} trainable coordinates: expected at most {self.coordinates}, those of the module when training "
                "began. Add parameters before fit."
            )
        add_discrete_noise(parts, coordinates, variance=self.variance, key=key, step=step)
        return state

    def std(self, step: int, state: MechanismState) -> float:
        """The parameter of the discrete Gaussian; its own standard deviation is no larger, and as good as the same."""
        return math.sqrt(self.variance) * self.unit

    def to_float(self, total: Tensor, divisor: float) -> Tensor:
        """In float64."""
        return _integers(total).double().mul_(self.unit / divisor)

    def released(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As the sums, in float64."""
        return shaped_like(sums, torch.float64)


def add_discrete_noise(parts: Parts, coordinates: int, *, variance: Fraction, key: RandomKey, step: int) -> None:
    """Add an independent discrete Gaussian to every coordinate of those parts of a flat sum that are this rank's, in place.

    Coordinates have their noise by blocks, each with a key stream of its own, as in
    :func:`lightning_dp.mechanism.gaussian.add_gaussian_noise`.

    Args:
        parts: (place of a part's first coordinate in the flat sum, the part), int64, on any device; the noise is drawn on
            the CPU.
        coordinates: P, of the flat sum.
        variance: s².
        key: secret; its NOISE stream at ``step`` is used for nothing else.
        step: number of the step in the run's life. A step's noise must be added exactly once.

    Raises:
        TypeError: a part is not int64: noise on a grid protects nothing but integers.
        ValueError: parts overlap, or one reaches beyond P.
    """
    for _, part in parts:
        _integers(part)
    for block, length, here in in_blocks(parts, coordinates, BLOCK):
        noise = torch.from_numpy(discrete_gaussian(variance, length, Keystream.of(key, Stream.NOISE, step, block)))
        for part, where in here:
            part.add_(noise[where].to(part.device))


def _integers(total: Tensor) -> Tensor:
    if total.dtype != torch.int64:
        raise TypeError(
            f"sum of dtype={total.dtype}: expected torch.int64. Discrete noise protects sums of integers; make them with "
            "to_grid, one example at a time."
        )
    return total
