"""From the ranks' sums of clipped gradients to the noisy gradient that may be used and published."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lightning_dp.mechanism.grid import release_on_grid
from lightning_dp.mechanism.noise import add_gaussian_noise
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.reduce import AllReduceSum, Unflatten, flatten, no_reduce, unflatten
from lightning_dp.plan.privacy_plan import PrivacyPlan


def release(
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
    """Turn the ranks' sums of clipped gradients into the one noisy gradient that may be used and published.

    Each rank adds N(0, (σC)²) to its own share of the coordinates of its own sum before the ranks' sums are added up,
    so the total holds the noise exactly once at any number of ranks, no rank waits for another's noise, and every rank
    ends up with the very same numbers. The only division is by the public expected batch size.

    Args:
        gradient: this rank's sums of clipped gradients, in the accumulation type. Left as they are.
        plan: σ, C and the divisor.
        key: the run's key, the same on every rank.
        step: the number of the step in the run's life.
        rank: this process's number.
        world_size: how many processes' sums ``all_reduce_sum`` adds up.
        all_reduce_sum: the sum over the ranks, given on every one of them; of sharded parameters, each rank's part of it.
        unflatten: from that to a gradient by name.

    Guarantee:
        The Gaussian mechanism with noise multiplier σ on a sum of L2 sensitivity C, whatever the clipping style; (ε, δ) over
        steps by the ledger.
        A plan with a ``resolution`` takes sums of integers and discrete noise, see
        :func:`lightning_dp.mechanism.grid.release_on_grid`.
    """
    if plan.resolution is not None:
        return release_on_grid(
            gradient,
            plan,
            key,
            step,
            rank=rank,
            world_size=world_size,
            all_reduce_sum=all_reduce_sum,
            unflatten=unflatten,
        )
    flat = flatten(gradient)
    add_gaussian_noise(flat, noise_std=plan.noise_std, key=key, step=step, rank=rank, world_size=world_size)
    flat = all_reduce_sum(flat)
    return unflatten(flat.div_(plan.expected_batch_size), gradient)
