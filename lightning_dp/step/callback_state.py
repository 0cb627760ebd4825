"""What callbacks of the user's have kept since the first step, hidden from hooks that must not depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_dp.step.reach import Reach


class CallbackState:
    """What callbacks keep for themselves, twice: as it is, and as it would be if all their hooks had run without data.

    Args:
        callbacks: of the user's, as they are when training begins.
        beside: what is not followed from there, such as the module.
    """

    def __init__(self, callbacks: Iterable[Any], beside: Iterable[Any]) -> None:
        self._theirs, self._beside = list(callbacks), list(beside)
        self._stand_in = self._reach()
        self._values = _values(self._stand_in.tensors.values())

    @contextmanager
    def on_stand_in(self, *, keep: bool) -> Iterator[None]:
        """While open, the callbacks hold what follows from nobody's data; ``keep`` what they come to hold meanwhile."""
        now = self._reach()
        values = _values([*self._stand_in.tensors.values(), *now.tensors.values()])
        _put_back(self._stand_in, self._values)
        try:
            yield
        finally:
            if keep:
                self._stand_in = self._reach()
                self._values = _values(self._stand_in.tensors.values())
            else:
                _put_back(self._stand_in, self._values)
            _put_back(now, values)

    def _reach(self) -> Reach:
        reach = Reach()
        reach.leave_out(self._beside)
        for place, callback in enumerate(self._theirs):
            reach.walk(f"callback {place}", vars(callback))
            reach.walk(f"callback {place}", type(callback))
        return reach


def _values(tensors: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return [(tensor, tensor.detach().clone()) for tensor in tensors]


def _put_back(reach: Reach, values: list[tuple[Tensor, Tensor]]) -> None:
    for place in reach.places:
        if place.differs():
            place.put_back()
    with torch.no_grad():
        for tensor, value in values:
            if tensor.shape == value.shape:
                tensor.detach().copy_(value)
