"""The micro-batch size that fits, or that fits and is fast, found on copies of the first examples before training.

Nothing here touches privacy. No step is taken, nothing is charged, drawn or released; a size that does not fit is found out
before the first step and never during one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lightning_dp.batches.microbatch import take
from lightning_dp.look.batch_size.memory import peak_bytes

LONG_ENOUGH = 5.0
"""Seconds: where one micro-batch takes as long, a larger one saves nothing worth having."""

PATIENCE = 3.0
"""Seconds that looking for what fits may take."""

SATURATED = 1.0
"""Seconds: a micro-batch that takes as long leaves an accelerator hardly a gap to fill, so no larger one is looked for."""

LEAP = 16
"""How many times as large the next size may be: what one takes that leaves gaps says little about one that leaves none."""

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

    def describe(self, room: int, given: str | None = "auto") -> str:
        """One line for people, who gave ``physical_batch_size=given``."""
        chosen = next(one for one in self.tried if one.examples == self.examples)
        each = 1e3 * chosen.seconds / chosen.examples
        return (
            f"lightning_dp: physical_batch_size={given!r} is {self.examples}: {each:.3g} ms an "
            f"example and {chosen.bytes / 2**20:.3g} MiB of the {room / 2**20:.4g} MiB that may be used, on copies of the "
            f"first examples; {self.because}."
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


def fill_memory(
    measure: Callable[[int], Measured | None], room: int, most: int, clock: Callable[[], float] = time.perf_counter
) -> Found | None:
    """Measure small micro-batches, and then the one that by these would fill the memory.

    Each size is at most :data:`LEAP` times the one before, and what the line through the last two allows: of memory, and of
    :data:`SATURATED` seconds for a micro-batch. Where one does not fit after all, less is tried. It ends after about
    :data:`PATIENCE` seconds, or where a tenth more is not to be had.

    Args:
        measure: tries a number of examples; ``None`` if memory ran out.
        room: bytes that a micro-batch may take.
        most: the largest size of any use, at least 1.
        clock: seconds.

    Returns:
        The largest size that was tried and fits; a multiple of 8 if it is above 16 and below ``most``. ``None`` if one
        example alone runs out of memory.

    Example:
        >>> fill_memory(lambda n: Measured(n, bytes=1000 * n, seconds=0.001 * n), room=70_500, most=512).examples
        64
    """
    start, tried = clock(), dict[int, Measured]()
    size, ceiling = min(2, most), most
    while True:
        one = measure(size)
        if one is not None:
            tried[size] = one
        if one is None or one.bytes > room:
            ceiling = size - 1 if one is not None else size // 2
        fitting = [tried[n] for n in sorted(tried) if tried[n].bytes <= room]
        if not fitting and size > 1:
            size = max(1, size // 2)
            continue
        left = PATIENCE - (clock() - start)
        if not fitting:
            because = "a single example takes more"
            break
        if left <= 0:
            because = f"looking took {PATIENCE - left:.1f} s, and may take {PATIENCE:g}"
            break
        size, because = _following(fitting, room, ceiling, most, left)
        if size <= 1.1 * fitting[-1].examples:
            break
    found = fitting or list(tried.values())[-1:]
    return Found(found[-1].examples, because, tuple(tried.values())) if found else None


def _following(fitting: list[Measured], room: int, ceiling: int, most: int, left: float) -> tuple[int, str]:
    """The size to try next, and what says that it is not larger."""
    last, share = fitting[-1], fitting[-1].bytes / fitting[-1].examples
    by_bytes, by_seconds = share, last.seconds / last.examples
    if len(fitting) > 1:
        before, more = fitting[-2], last.examples - fitting[-2].examples
        by_bytes = max((last.bytes - before.bytes) / more, share / 2)
        by_seconds = max((last.seconds - before.seconds) / more, 0.0)
    slow = min(SATURATED, left / 2) - last.seconds  # a size is run twice
    limits = [
        (float(most), "more than a step draws would be of no use"),
        (float(ceiling), "more did not fit"),
        (last.examples + (room - last.bytes) / by_bytes if by_bytes else math.inf, "more would not fit"),
        (last.examples + slow / by_seconds if by_seconds else math.inf, "a larger one would hardly be faster"),
    ]
    size, because = min(limits, key=lambda limit: limit[0])
    size = min(int(size), (4 if len(fitting) == 1 else LEAP) * last.examples)
    return size - size % 8 if 16 < size < most else size, because


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


def measured_once(work: Callable[[], Callable[[], object]], examples: int, device: torch.device) -> Measured | None:
    """Memory of two passes over ``examples`` examples and the time of the second; see :func:`measured`."""
    seconds = 0.0

    def passes() -> None:
        nonlocal seconds
        one = work()
        one()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        one()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start

    try:
        return Measured(examples, peak_bytes(passes, device), seconds)
    except (torch.OutOfMemoryError, MemoryError):
        return None
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


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


def copies(batch: Any, examples: int, rows: int) -> Any:
    """A batch of ``rows`` examples that are those of ``batch``, again and again.

    Whole examples, so that each is one that training_step can take: labels stay labels, and masks go with what they mask.

    Args:
        batch: see :func:`lightning_dp.batches.microbatch.check_batch_axis`.
        examples: in it.
        rows: how many are wanted.
    """
    return take(batch, [row % examples for row in range(rows)])
