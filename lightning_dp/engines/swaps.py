"""Swaps of two tensors' contents, refused where one of them would be used after the engine's vmap is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils
from torch import Tensor
from torch._C import _functorch

from lightning_dp.mechanism.while_open import WhileOpen

_OWNERS: tuple[tuple[Any, str], ...] = ((torch.utils, "swap_tensors"), (torch._C, "_swap_tensor_impl"))
"""The public function, and what it calls, for those who have imported it by name."""

SWAPPED = "it swaps a tensor that depends on the example, or on a weight, with one that all examples share"


@contextmanager
def _in_place_of_torchs() -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name in _OWNERS if hasattr(owner, name)]

    def checked(original: Any) -> Any:
        def swap(one: Any, other: Any) -> Any:
            if SWAPS.here and is_wrapped(one) != is_wrapped(other):
                raise RuntimeError(SWAPPED)
            return original(one, other)

        return swap

    try:
        for owner, name, original in before:
            setattr(owner, name, checked(original))
        yield
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)


SWAPS = WhileOpen(_in_place_of_torchs)
"""While open, in this thread, no tensor under vmap gets the place of one that is not."""


def is_wrapped(one: Any) -> bool:
    """Whether ``one`` is a tensor that exists only while a transform of ``torch.func`` is under way."""
    return isinstance(one, Tensor) and bool(_functorch.is_functorch_wrapped_tensor(one))
