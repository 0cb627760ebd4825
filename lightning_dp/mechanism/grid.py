"""Clipped gradients and noise as integers: exact sums, a sensitivity that is checked, and discrete noise.

per-example gradient → to_grid → integers, summed exactly → + share of discrete Gaussian → sum over ranks → back to floats
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch
from torch import Tensor

from lightning_dp.mechanism.discrete_gaussian import discrete_gaussian
from lightning_dp.mechanism.keystream import Keystream
from lightning_dp.mechanism.noise import BLOCK, share_of
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.reduce import AllReduceSum, Unflatten, flatten, no_reduce, unflatten
from lightning_dp.plan.privacy_plan import PrivacyPlan

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
    return unflatten(units, _shaped_like(gradient, torch.int64))


def release_on_grid(
    gradient: Mapping[str, Tensor],
    plan: PrivacyPlan,
    key: RandomKey,
    step: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    all_reduce_sum: AllReduceSum = no_reduce,
    unflatten: Unflatten = unflatten,
) -> dict[str, Tensor]:
    """The ranks' integer sums, with discrete noise once, as the noisy gradient that may be used and published.

    Each rank adds discrete Gaussian noise of scale σΔ to its own share of the coordinates of its own sum, before the ranks'
    sums are added up, so that the total holds it once. What leaves the integers afterwards (the factor C/ΔB, and floating
    point) is post-processing. So would be a sum that wraps around at 2⁶³, although a plan that could come near it is refused.

    Args:
        gradient: parameter name → int64 sum of this rank's examples on the grid. **Private.**
        plan: with a ``resolution``.
        key: secret; the NOISE stream of ``step`` is used for nothing else.
        step: number of the step in the run's life.
        rank: of this process.
        world_size: how many processes' sums are added up.
        all_reduce_sum: adds int64 tensors up over the ranks; of sharded parameters, gives each rank its part.
        unflatten: from that to a gradient by name.

    Returns:
        Parameter name → float64.

    Raises:
        TypeError: a sum is not int64: noise on a grid protects nothing but integers.
        RuntimeError: there are more coordinates than the plan accounts for.

    Guarantee:
        The Gaussian mechanism with noise multiplier σ on a sum of sensitivity C, but for the divergence of discrete from
        rounded Gaussian noise, which the ledger counts (:func:`lightning_dp.accounting.slack.discretisation_divergence`).
    """
    assert plan.resolution is not None
    assert plan.coordinates is not None
    flat = _integers(flatten(gradient))
    if flat.numel() > plan.coordinates:
        raise RuntimeError(
            f"{flat.numel()} trainable coordinates: expected at most {plan.coordinates}, those of the module when training "
            "began. Add parameters before fit."
        )
    add_discrete_gaussian(flat, variance=noise_variance(plan), key=key, step=step, rank=rank, world_size=world_size)
    flat = _integers(all_reduce_sum(flat))
    released = flat.double().mul_(plan.clip_norm / plan.resolution / plan.expected_batch_size)
    return unflatten(released, _shaped_like(gradient, torch.float64))


def noise_variance(plan: PrivacyPlan) -> Fraction:
    """(σΔ)², exactly."""
    return Fraction(plan.noise_multiplier) ** 2 * (plan.resolution or 1) ** 2


def add_discrete_gaussian(
    total: Tensor, *, variance: Fraction, key: RandomKey, step: int, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Add an independent discrete Gaussian to every coordinate of this rank's share of ``total``, in place.

    Blocks of coordinates, each with a key stream of its own, fall to the ranks as in
    :func:`lightning_dp.mechanism.noise.add_gaussian_noise`.

    Args:
        total: int64, ``(P,)``, on any device; the noise is drawn on the CPU.
        variance: s².
        key: secret; its NOISE stream at ``step`` is used for nothing else.
        step: number of the step in the run's life. A step's noise must be added exactly once.
        rank: which share is this rank's.
        world_size: how many ranks add their shares.

    Returns:
        ``total``.

    Raises:
        TypeError: ``total`` is not int64.
        ValueError: ``rank`` is not one of ``world_size``.
    """
    for block in share_of(rank, world_size, -(-_integers(total).numel() // BLOCK)):
        part = total[block * BLOCK : (block + 1) * BLOCK]
        noise = discrete_gaussian(variance, part.numel(), Keystream.of(key, Stream.NOISE, step, block))
        part.add_(torch.from_numpy(noise).to(total.device))
    return total


def _integers(total: Tensor) -> Tensor:
    if total.dtype != torch.int64:
        raise TypeError(
            f"sum of dtype={total.dtype}: expected torch.int64. Discrete noise protects sums of integers; make them with "
            "to_grid, one example at a time."
        )
    return total


def _shaped_like(gradient: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: torch.empty(part.shape, dtype=dtype, device="meta") for name, part in gradient.items()}
