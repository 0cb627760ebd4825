"""Clipped gradients as integers: exact sums, and a sensitivity that is checked.

per-example gradient → to_grid → integers, summed exactly → + share of discrete Gaussian → sum over ranks → back to floats
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dp.mechanism.reduce import flatten, unflatten

RESOLUTION = 2**30
"""Δ, how many units of the grid the clip norm has."""

SHORTER = 1.0 - 2.0**-16
"""Clipped gradients are made shorter by this factor, so that no rounding takes them past the clip norm."""


def to_grid(gradient: Mapping[str, Tensor], clip_norm: float, resolution: int = RESOLUTION) -> dict[str, Tensor]:
    """One example's gradient on the integer grid, clipped to Δ units.

    The gradient is scaled to Δ/C units, to a norm of at most Δ·(1 - 2⁻¹⁶), and every coordinate is rounded towards zero,
    which makes no coordinate larger.

    Args:
        gradient: parameter name → the gradient of one example, of any shape, in floating point. **Private.**
        clip_norm: C, finite.
        resolution: Δ ≤ 2³⁰.

    Returns:
        Parameter name → int64 of the same shape. **Private.**

    Guarantee:
        The squares of all integers add up to Δ² at most, whatever the gradient. This is checked in integer arithmetic, and
        an example for which it did not hold would contribute zero. Integers add up without rounding in any order, so
        adding or removing one example moves the sum over all examples and ranks by exactly that example's integers: the
        L2 sensitivity is Δ, not Δ up to rounding.

    Edge cases:
        ====================  ======================================================
        NaN or ∞ anywhere     all zeros: the example contributes nothing
        norm of 0             all zeros
        a float64 norm of ∞   all zeros
        ====================  ======================================================

    Example:
        >>> to_grid({"w": torch.tensor([3.0, -4.0])}, clip_norm=1.0, resolution=1000)
        {'w': tensor([ 599, -799])}
    """
    scaled = flatten(gradient).double() * (resolution / clip_norm)
    norm = torch.linalg.vector_norm(scaled)
    usable = torch.isfinite(norm)
    factor = torch.where(usable, (resolution * SHORTER / norm).clamp(max=1.0), 0.0)
    units = torch.where(usable, scaled * factor, 0.0).trunc().to(torch.int64)
    # The norm in floating point is right to 10⁻⁶ at 10⁹ coordinates: the squares add up to less than 2⁶¹, without overflow.
    units *= units.square().sum() <= resolution**2
    return unflatten(units, shaped_like(gradient, torch.int64))


def shaped_like(gradient: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the gradient's shapes and another type, without values."""
    return {name: torch.empty(part.shape, dtype=dtype, device="meta") for name, part in gradient.items()}
