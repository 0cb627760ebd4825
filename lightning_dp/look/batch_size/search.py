"""``physical_batch_size="auto"``: the micro-batch size that fits and is fast, found on random data before training.

Nothing here touches privacy. Only shapes, types and ranges of the first examples are used; no step is taken, nothing is
charged, drawn or released; a size that does not fit is found out before the first step and never during one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import is_list_of_values
from lightning_dp.look.batch_size.memory import peak_bytes

LONG_ENOUGH = 5.0
"""Seconds: where one micro-batch takes as long, a larger one saves nothing worth having."""

NO_FASTER = 0.05
"""Sizes whose time per example differs by at most this part count as equally fast; the smaller one is taken."""


@dataclass(frozen=True)
class Measured:
    """One size, tried.

    Attributes:
        examples: in the micro-batch.
        bytes: peak memory of the pass.
        seconds: that it took.
    """

    examples: int
    bytes: float
    seconds: float


@dataclass(frozen=True)
class Found:
    """The size chosen, why the search ended where it did, and all that was measured."""

    examples: int
    because: str
    tried: tuple[Measured, ...]

    def describe(self, room: int) -> str:
        """One line for people."""
        chosen = next(one for one in self.tried if one.examples == self.examples)
        return (
            f"lightning_dp: physical_batch_size='auto' is {self.examples}: {chosen.seconds / chosen.examples * 1e3:.3g} ms an "
            f"example and {chosen.bytes / 2**20:.3g} MiB of the {room / 2**20:.4g} MiB that may be used, on random data; "
            f"{self.because}."
        )


def search_size(measure: Callable[[int], Measured | None], room: int, most: int) -> Found | None:
    """Double the micro-batch until the next size would not fit, is not faster, or is more than a step has.

    Args:
        measure: tries a number of examples; ``None`` if memory ran out.
        room: bytes that a micro-batch may take.
        most: the largest size of any use, at least 1.

    Returns:
        The smallest of the sizes that fit and are about as fast as the fastest of them. ``None`` if one example alone
        runs out of memory.

    Guarantee:
        Beyond the first, no size is tried that the sizes before it predict not to fit.

    Example:
        >>> search_size(lambda n: Measured(n, bytes=1000 * n, seconds=1 + 0.01 * n), room=70_000, most=512).examples
        64
    """
    tried: list[Measured] = []
    best, stalled, size = math.inf, 0, 1
    because = "more than a step draws would be of no use"
    while size <= most:
        if tried and _predicted(tried, size) > room:
            because = "twice as many would not fit"
            break
        one = measure(size)
        if one is None:
            because = "twice as many did not fit"
            break
        tried.append(one)
        per_example = one.seconds / size
        stalled = 0 if per_example < best * (1 - NO_FASTER) else stalled + 1
        best = min(best, per_example)
        if stalled == 2 or one.seconds > LONG_ENOUGH:
            because = "more examples at once are not faster"
            break
        if size == most:
            break
        size = min(2 * size, most)
    fitting = [one for one in tried if one.bytes <= room] or tried[:1]
    if not fitting:
        return None
    fastest = min(one.seconds / one.examples for one in fitting)
    fast = [one for one in fitting if one.seconds / one.examples <= fastest * (1 + NO_FASTER)]
    return Found(min(one.examples for one in fast), because, tuple(tried))


def _predicted(tried: list[Measured], size: int) -> float:
    """Peak memory of ``size`` examples: on the line through the last two sizes (through zero, if there is one).

    If the line is so flat that it would put more than half of the last size's memory down to what does not grow, it is
    not believed: an example counts for half its share at least.
    """
    last = tried[-1]
    share = last.bytes / last.examples
    slope = share
    if len(tried) > 1:
        slope = max((last.bytes - tried[-2].bytes) / (last.examples - tried[-2].examples), share / 2)
    return last.bytes + slope * (size - last.examples)


def measured(work: Callable[[], Callable[[], object]], examples: int, device: torch.device) -> Measured | None:
    """Memory and time of a pass over ``examples`` examples.

    Args:
        work: makes a pass that has kept nothing from an earlier one.
        examples: in it.
        device: on which it runs.

    Returns:
        ``None`` if memory ran out.
    """
    try:
        work()()  # what is allocated once and kept, whatever the size, is allocated now
        again = work()
        size = peak_bytes(again, device)
        seconds, spent, times = math.inf, 0.0, 0
        while times < 2 or (times < 5 and spent < 1.0):  # the least of several: a machine is never idle
            start = time.perf_counter()
            again()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = min(seconds, time.perf_counter() - start)
            spent, times = spent + seconds, times + 1
            if seconds > LONG_ENOUGH:
                break
    except (torch.OutOfMemoryError, MemoryError):
        return None
    return Measured(examples, size, seconds)


def random_rows(batch: Any, rows: int) -> Any:
    """A batch of ``rows`` random examples with the shapes, types and ranges of the examples in ``batch``.

    Numbers are uniform between the least and the greatest of their tensor, so that class indices, words and
    probabilities stay what they are. Everything is drawn from a generator of its own.

    Args:
        batch: any nest of tensors with one row per example, see
            :func:`lightning_dp.batches.microbatch.check_batch_axis`.
        rows: how many.
    """
    generator = torch.Generator().manual_seed(0)

    def leaf_of(leaf: Any) -> Any:
        if is_list_of_values(leaf):
            return type(leaf)(leaf[0] for _ in range(rows))
        if not isinstance(leaf, Tensor):
            return leaf
        shape = (rows, *leaf.shape[1:])
        if leaf.is_complex() or leaf.numel() == 0:
            return leaf[:1].expand(shape).clone()
        values = leaf.detach().cpu()
        if leaf.is_floating_point():
            values = values.double().nan_to_num(0.0, 1.0, -1.0)
            low, high = float(values.min()), float(values.max())
            drawn = low + (high - low) * torch.rand(shape, generator=generator)
        else:
            drawn = torch.randint(int(values.min()), int(values.max()) + 1, shape, generator=generator)
        return drawn.to(leaf)

    return pytree.tree_map(leaf_of, batch, is_leaf=is_list_of_values)
