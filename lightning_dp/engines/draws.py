"""Random numbers that are written into empty tensors, drawn in a way that works for many examples at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import lowrank_multivariate_normal, multivariate_normal, normal, studentT

from lightning_dp.mechanism.while_open import WhileOpen

_NAME = "_standard_normal"
_USERS: tuple[Any, ...] = (normal, multivariate_normal, lowrank_multivariate_normal, studentT)


@contextmanager
def _in_place_of_theirs() -> Iterator[None]:
    before = [(module, getattr(module, _NAME)) for module in _USERS if hasattr(module, _NAME)]
    try:
        for module, original in before:
            setattr(module, _NAME, partial(_standard_normal, original))
        yield
    finally:
        for module, original in before:
            setattr(module, _NAME, original)


_REPLACED = WhileOpen(_in_place_of_theirs)


def _standard_normal(original: Callable[..., Tensor], shape: Sequence[int], dtype: Any, device: Any) -> Tensor:
    if not _REPLACED.here:  # another thread, that has nothing to do with it
        return original(shape, dtype, device)
    return torch.randn(tuple(shape), dtype=dtype, device=device)


def can_be_drawn_into(options: Mapping[str, Any]) -> bool:
    """Whether ``torch.empty`` with these options is an ordinary tensor."""
    return options.keys() <= {"size", "dtype", "device"}


def empty_for_all(witness: Tensor, *size: Any, dtype: Any = None, device: Any = None, **named: Any) -> Tensor:
    """``torch.empty``, with memory for each example under vmap.

    What is empty is made to be filled in place, as with a coin of each example (``torch.empty(...).bernoulli_(p)`` in
    torchvision's stochastic depth), and a tensor that all examples share cannot be filled with different numbers.

    Args:
        witness: a tensor that the engine's own vmap maps over.
        size: as ``torch.empty`` takes it.
        dtype: as ``torch.empty`` takes it.
        device: as ``torch.empty`` takes it.
        named: ``size`` by its name.
    """
    shape = named.get("size", size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
    made: Tensor = witness.new_empty(
        tuple(shape),
        dtype=torch.get_default_dtype() if dtype is None else dtype,
        device=torch.get_default_device() if device is None else device,
    )
    return made


@contextmanager
def drawn_for_all() -> Iterator[None]:
    """While it lasts, ``Normal(...).rsample()`` and its relatives draw numbers for each example under vmap.

    They fill an empty tensor in place, and an empty tensor is the same for all examples, which torch.func refuses to fill
    with different numbers. ``torch.randn`` draws the same law, for each example anew. (Where a
    version of PyTorch has no such function, nothing is put in its place.) Other threads draw as ever.
    """
    with _REPLACED.open():
        yield
