"""Questions that seldom have another answer than no, which an accelerator is asked once more of its work is queued.

``if bool(flag):`` makes the host wait until the device has computed the flag, and the device wait until the host has queued
more. Where somebody has opened :func:`put_off`, :func:`is_so` takes the answer no for granted, and the flag is kept. Whoever
opened it looks at the flags later, and computes anew what a yes has made wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_flags: ContextVar[list[Tensor] | None] = ContextVar("_flags", default=None)

ASKED_AT_ONCE = {"cpu"}
"""Kinds of devices on which an answer costs no wait."""


def is_so(flag: Tensor) -> bool:
    """Whether ``flag``, one truth value, is true; no, for the time being, where questions are put off."""
    flags = _flags.get()
    if flags is None or flag.device.type in ASKED_AT_ONCE:
        return bool(flag)
    flags.append(flag)
    return False


@contextmanager
def put_off(later: bool = True) -> Iterator[list[Tensor]]:
    """While open, :func:`is_so` puts questions off.

    Args:
        later: False to have them asked at once again.

    Yields:
        The flags that were not looked at.
    """
    flags: list[Tensor] = []
    token = _flags.set(flags if later else None)
    try:
        yield flags
    finally:
        _flags.reset(token)


class Answer:
    """Whether one of several flags is true, on its way to the host.

    Args:
        flags: single truth values on one device, at least one.
    """

    def __init__(self, flags: Sequence[Tensor]) -> None:
        any_of_them = flags[0] if len(flags) == 1 else torch.stack(list(flags)).any()
        self._copied: torch.Event | None = None
        self._here = any_of_them
        if any_of_them.device.type == "cuda":  # into pinned memory, and no further than this place of the queue
            self._here = any_of_them.to("cpu", non_blocking=True)
            self._copied = torch.Event(any_of_them.device)
            self._copied.record()

    def __bool__(self) -> bool:
        """The answer, waiting for what was queued before the question and for nothing after it."""
        if self._copied is not None:
            self._copied.synchronize()
        return bool(self._here)
