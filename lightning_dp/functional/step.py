"""The whole private step on one page. The Lightning strategy must give what this gives.

sample → micro-batches → per-example gradients → clip & sum → + share of noise → sum over ranks → ÷ expected batch
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dp.clipping import Clipping
from lightning_dp.functional.clip import accumulation_dtype
from lightning_dp.functional.gradient import Engine, LossFunction
from lightning_dp.functional.grid import release_on_grid
from lightning_dp.functional.microbatch import padded
from lightning_dp.functional.noise import add_gaussian_noise
from lightning_dp.functional.randomness import RandomKey
from lightning_dp.functional.reduce import AllReduceSum, Unflatten, flatten, no_reduce, unflatten
from lightning_dp.plan import PrivacyPlan


@dataclass
class Accumulated:
    """What a rank has of a step before anything is released. All of it is **private**.

    Attributes:
        gradient: parameter name → sum of clipped gradients, in the accumulation type.
        losses: per-example losses, one ``(B_i,)`` tensor per micro-batch.
        norms: per-example gradient norms before clipping, likewise.
        outputs: what the loss function handed out beside the loss, per micro-batch.
    """

    gradient: dict[str, Tensor]
    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    @property
    def examples(self) -> int:
        """How many examples this rank has seen in this step (private)."""
        return sum(len(losses) for losses in self.losses)

    @property
    def not_finite(self) -> int:
        """How many of them had a gradient that was not finite and contributed zero (private)."""
        return sum(int((~torch.isfinite(norms)).sum()) for norms in self.norms)


def accumulate(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    micro_batches: Iterable[tuple[Any, int]],
    clipping: Clipping | float,
    *,
    pad_to: int | None = None,
    dtype: torch.dtype | None = None,
    apart: Collection[str] = (),
) -> Accumulated:
    """Sum of the clipped per-example gradients of a step's micro-batches. No noise yet, nothing may be released.

    Args:
        engine: how per-example gradients are computed; any engine gives the same sum.
        loss_function: ``(parameters, batch of one) -> (loss, outputs)``.
        parameters: the trainable parameters by name.
        micro_batches: pairs of a batch and its number of examples. None at all is fine: the sum is zero.
        clipping: the plan's; a number C for flat clipping to that norm.
        pad_to: give every micro-batch this many rows, at least as many as any has, by copies that count in nothing. The
            result is the same; shapes no longer vary with the draw.
        dtype: of the sums; ``None`` for the accumulation type of each parameter, int64 for integers on a grid.
        apart: parameters whose sums the engine hands to somebody else.
    """
    total = Accumulated(
        {
            name: torch.zeros_like(p, dtype=dtype or accumulation_dtype(p.dtype))
            for name, p in parameters.items()
            if name not in apart
        }
    )
    for batch, examples in micro_batches:
        rows, counted = examples, None
        if pad_to is not None:
            batch, rows, counted = padded(batch, examples, pad_to), pad_to, examples
        clipped = engine.clipped_sum(loss_function, parameters, batch, rows, clipping, counted=counted)
        for name, gradient in clipped.gradient.items():
            total.gradient[name] += gradient
        total.losses.append(clipped.losses)
        total.norms.append(clipped.norms)
        total.outputs.append(clipped.outputs)
    return total


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
        :func:`lightning_dp.functional.grid.release_on_grid`.
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


def private_gradient(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    micro_batches: Iterable[tuple[Any, int]],
    plan: PrivacyPlan,
    key: RandomKey,
    step: int,
) -> dict[str, Tensor]:
    """One DP-SGD step's gradient on a single rank, from micro-batches to what the optimizer gets."""
    dtype = None if plan.resolution is None else torch.int64
    total = accumulate(engine, loss_function, parameters, micro_batches, plan.clipping_rule, dtype=dtype)
    return release(total.gradient, plan, key, step)
