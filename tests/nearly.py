"""Comparison of computed numbers, wherever they stand: in tensors, dataclasses, mappings, sequences."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

ROUNDING = 1e-9
"""For numbers in double precision. Another processor, thread count or library adds up in another order, which moves a sum
of a thousand terms by some 10⁻¹³ of its size; what a test is after moves it by more than 10⁻⁶."""


def assert_nearly(one: Any, other: Any, rtol: float = ROUNDING, atol: float = ROUNDING, where: str = "value") -> None:
    """Fail unless both have the same structure, tensors and floats agree to rounding, and all else is equal.

    :func:`torch.testing.assert_close` falls back on equality for dataclasses, which is equality of every tensor in them.

    Args:
        one: what was found.
        other: what was expected.
        rtol: relative tolerance.
        atol: absolute tolerance.
        where: what the values are called in the message.
    """
    assert type(one) is type(other) or isinstance(one, float | int) is isinstance(other, float | int) is True, where
    if isinstance(one, Tensor):
        torch.testing.assert_close(
            one, other, rtol=rtol, atol=atol, equal_nan=True, msg=lambda text: f"{where}: {text}"
        )
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            name = field.name
            assert_nearly(getattr(one, name), getattr(other, name), rtol, atol, f"{where}.{name}")
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_nearly(one[key], other[key], rtol, atol, f"{where}[{key!r}]")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            assert_nearly(mine, theirs, rtol, atol, f"{where}[{index}]")
    elif isinstance(one, float):
        assert one == pytest.approx(other, rel=rtol, abs=atol, nan_ok=True), where
    else:
        assert one == other, where
