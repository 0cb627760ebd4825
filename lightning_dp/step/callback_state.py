"""What callbacks of the user's have kept since the first step, hidden from hooks that must not depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_dp.step.reach import Reach


class CallbackState:
    """The attributes of callbacks as they were when training began.

    Args:
        callbacks: of the user's.
        beside: what is not followed from there, such as the module.
    """

    def __init__(self, callbacks: Iterable[Any], beside: Iterable[Any]) -> None:
        self._theirs, self._beside = list(callbacks), list(beside)
        self._first = self._reach()
        self._values = _values(self._first.tensors)

    @contextmanager
    def as_at_first(self) -> Iterator[None]:
        """While open, the callbacks hold what they held when training began."""
        now = self._reach()
        values = _values({**self._first.tensors, **now.tensors})
        _put_back(self._first, self._values)
        try:
            yield
        finally:
            _put_back(self._first, self._values)
            _put_back(now, values)

    def _reach(self) -> Reach:
        reach = Reach()
        reach.leave_out(self._beside)
        for place, callback in enumerate(self._theirs):
            reach.walk(f"callback {place}", vars(callback))
        return reach


def _values(tensors: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in tensors.values()]


def _put_back(reach: Reach, values: list[tuple[Tensor, Tensor]]) -> None:
    for place in reach.places:
        if place.differs():
            place.put_back()
    with torch.no_grad():
        for tensor, value in values:
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)
