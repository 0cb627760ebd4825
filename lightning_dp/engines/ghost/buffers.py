"""Memory for gradients of examples that is used again at the next micro-batch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_dp.engines.forms import Forms


class Buffers:
    """Hands out memory and takes all of it back at once.

    The gradients of a layer's examples are the largest tensors of a step, and on a CPU the first touch of fresh memory
    costs more than filling it. Sizes vary with the draw, so a buffer is given to whatever fits.

    Args:
        forms: in which form what it is needed for is computed; ``None`` for the estimated ones.
    """

    def __init__(self, forms: Forms | None = None) -> None:
        self.forms = Forms() if forms is None else forms
        self._free: list[Tensor] = []
        self._lent: list[Tensor] = []

    def take(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised tensor of ``shape`` and of the type and device of ``like``, until :meth:`take_back`."""
        size = math.prod(shape)
        alike = [b for b in self._free if b.dtype == like.dtype and b.device == like.device]
        fitting = [b for b in alike if b.numel() >= size]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._forget(buffer)
        else:
            if alike:  # grown out of: its place is taken, so that memory does not grow with every new size
                self._forget(max(alike, key=Tensor.numel))
            buffer = torch.empty(size, dtype=like.dtype, device=like.device)
        self._lent.append(buffer)
        return buffer[:size].view(*shape)

    def take_back(self) -> None:
        """What was handed out is free again: nobody may read it any more."""
        self._free += self._lent
        self._lent = []

    @contextmanager
    def lent_meanwhile(self) -> Iterator[None]:
        """What is handed out while it is open is free again when it closes."""
        before = len(self._lent)
        try:
            yield
        finally:
            self._free += self._lent[before:]
            del self._lent[before:]

    def _forget(self, buffer: Tensor) -> None:
        self._free = [b for b in self._free if b is not buffer]
