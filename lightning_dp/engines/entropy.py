"""Whether code asks the operating system for random numbers, which no seed decides."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_dp.mechanism.while_open import WhileOpen

_NAME = "_urandom"
_asked = threading.local()


@contextmanager
def _watched() -> Iterator[None]:
    original = getattr(random, _NAME)

    def urandom(size: int) -> bytes:
        if _WATCHED.here:
            _asked.value = True
        found: bytes = original(size)
        return found

    setattr(random, _NAME, urandom)
    try:
        yield
    finally:
        setattr(random, _NAME, original)


_WATCHED = WhileOpen(_watched)


@contextmanager
def watched() -> Iterator[None]:
    """While open, :func:`asked` knows of ``random.SystemRandom``, ``secrets``, and ``numpy.random.default_rng()``."""
    _asked.value = False
    with _WATCHED.open():
        yield


def asked() -> bool:
    """Whether this thread has asked since it opened :func:`watched`."""
    return bool(getattr(_asked, "value", False))
