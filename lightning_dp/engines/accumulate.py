"""From micro-batches to the sum of clipped gradients of a step, and the whole step of one process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dp.batches.microbatch import padded
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.mechanism.adaptive import nothing_beside
from lightning_dp.mechanism.clip import accumulation_dtype
from lightning_dp.mechanism.put_off import Answer, put_off
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import release
from lightning_dp.plan.clipping import Clipping, as_clipping
from lightning_dp.plan.privacy_plan import PrivacyPlan


@dataclass
class Accumulated:
    """What a rank has of a step before anything is released. All of it is **private**.

    Attributes:
        gradient: parameter name → sum of clipped gradients, in the accumulation type; last, the sum of what adapts C.
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
    def broken(self) -> Tensor | int:
        """How many of them had a gradient that was not finite and contributed zero (private), on the device: no wait."""
        return (~torch.isfinite(torch.cat(self.norms))).sum() if self.norms else 0

    @property
    def not_finite(self) -> int:
        """The same as a number, for which the host waits."""
        return int(self.broken)

    def add(self, clipped: ClippedSum) -> None:
        """Add a micro-batch."""
        totals, found = [self.gradient[name] for name in clipped.gradient], list(clipped.gradient.values())
        torch._foreach_add_(totals, found)
        self.losses.append(clipped.losses)
        self.norms.append(clipped.norms)
        self.outputs.append(clipped.outputs)


def accumulate(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    micro_batches: Iterable[tuple[Any, int]],
    clipping: Clipping | float,
    *,
    pad_to: int | None = None,
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
        apart: parameters whose sums the engine hands to somebody else.
    """
    total = Accumulated(
        {
            name: torch.zeros_like(p, dtype=engine.sum_dtype or accumulation_dtype(p.dtype))
            for name, p in parameters.items()
            if name not in apart
        }
    )
    total.gradient |= nothing_beside(parameters, as_clipping(clipping), engine.sum_dtype)
    before: _Queued | None = None
    for batch, examples in micro_batches:
        rows, counted = examples, None
        if pad_to is not None:
            batch, rows, counted = padded(batch, examples, pad_to), pad_to, examples
        sum_of = partial(engine.clipped_sum, loss_function, parameters, batch, rows, clipping, counted=counted)
        with put_off() as flags:
            queued = _Queued(sum_of(), sum_of, Answer(flags) if flags else None)
        if before is not None:
            total.add(before.settled())
            before = None
        if queued.answer is None:
            total.add(queued.found)
        else:
            before = queued
    if before is not None:
        total.add(before.settled())
    return total


@dataclass(frozen=True)
class _Queued:
    """A micro-batch whose answers are looked at once the next one is queued, so that a device never waits for the host.

    Attributes:
        found: its sum, if every answer is no.
        sum_of: computes it.
        answer: whether one is yes; ``None`` where nothing was put off.
    """

    found: ClippedSum
    sum_of: Callable[[], ClippedSum]
    answer: Answer | None

    def settled(self) -> ClippedSum:
        """Its sum: computed once more, with every question asked at once, if an answer is yes."""
        return self.found if self.answer is None or not self.answer else self.sum_of()


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
    total = accumulate(engine, loss_function, parameters, micro_batches, plan.clipping_rule)
    return release(total.gradient, plan.mechanism, key, step)[0]
