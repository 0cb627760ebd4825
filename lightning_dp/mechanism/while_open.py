"""A setting of the whole process, changed while some thread needs it and put back when none does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager


class WhileOpen:
    """Enters a context when the first thread comes and leaves it when the last one goes.

    Entered by each thread for itself, such a context would end with what another thread had put in place: the first to
    come may be the first to go.

    Args:
        context: makes the context manager that changes the setting.

    Example:
        >>> from contextlib import nullcontext
        >>> setting = WhileOpen(nullcontext)
        >>> with setting.open(), setting.open():
        ...     setting.here
        True
        >>> setting.here
        False
    """

    def __init__(self, context: Callable[[], AbstractContextManager[object]]) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._inside = 0
        self._entered: AbstractContextManager[object] | None = None
        self._depth = threading.local()

    @property
    def here(self) -> bool:
        """Whether the calling thread has it open."""
        return getattr(self._depth, "value", 0) > 0

    @contextmanager
    def open(self) -> Iterator[None]:
        """Have the setting changed while open."""
        with self._lock:
            if self._inside == 0:
                self._entered = self._context()
                self._entered.__enter__()
            self._inside += 1
        self._depth.value = getattr(self._depth, "value", 0) + 1
        try:
            yield
        finally:
            self._depth.value -= 1
            with self._lock:
                self._inside -= 1
                if self._inside == 0 and self._entered is not None:
                    self._entered.__exit__(None, None, None)
                    self._entered = None
