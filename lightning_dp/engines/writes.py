"""The line of the user's own by which something of the module is changed, for messages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

from lightning_dp.engines.user_code import Line, is_file_of_the_users


def line_that_changes(call: Callable[[], object], changed: Callable[[], bool]) -> Line | None:
    """Run ``call`` once more, and find the first line of the user's after which ``changed`` says so.

    Whatever way a write takes (``.data``, a NumPy view, a layer that writes itself), it is the user's line that made it.

    Args:
        call: what is known to make the change. What it raises is dropped.
        changed: whether it is made.
    """
    found: list[Line] = []
    at: list[Line] = []

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        if not is_file_of_the_users(frame.f_code.co_filename):
            return None
        if at and not found and changed():
            found.append(at[0])
        if found:
            sys.settrace(before)
            return None
        here = frame if event != "return" else _users(frame.f_back)  # what follows a return is the caller's line again
        if here is not None:
            at[:] = [Line(here.f_code.co_filename, here.f_lineno, here.f_code.co_name)]
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        with suppress(Exception):
            call()
    finally:
        sys.settrace(before)
    if not found and at and changed():
        found.append(at[0])
    return found[0] if found else None


def _users(frame: FrameType | None) -> FrameType | None:
    """The innermost frame of the user's from here outwards."""
    while frame is not None and not is_file_of_the_users(frame.f_code.co_filename):
        frame = frame.f_back
    return frame
