"""Whether two values of Python are the same by content, and copies that later changes do not reach."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _functorch

from lightning_dp.mechanism.memory import has_memory

_BY_VALUE = (int, float, complex, str, bytes, range, slice, np.generic, torch.dtype, torch.device, torch.Size)
_DEPTH = 5


def same(one: Any, other: Any, depth: int = _DEPTH) -> bool:
    """Whether two values have the same content: numbers, texts, tensors, arrays, and nests of them.

    Values of other kinds are the same if they are one object; so are tensors under a transform of ``torch.func``, whose
    content is not one.

    Example:
        >>> same({"w": 0.0, "at": (1, "a")}, {"w": 0.0, "at": (1, "a")}), same([torch.zeros(1)], [torch.ones(1)])
        (True, False)
    """
    if one is other:
        return True
    if type(one) is not type(other) or depth == 0:
        return False
    if isinstance(one, Tensor):
        return _same_tensors(one, other)
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind in "fc"))
    if isinstance(one, _BY_VALUE):
        return bool(one == other or (one != one and other != other))
    if isinstance(one, (set, frozenset)):
        return bool(one == other)
    if isinstance(one, Mapping):
        return len(one) == len(other) and all(
            key in other and same(value, other[key], depth - 1) for key, value in one.items()
        )
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(same(*pair, depth - 1) for pair in zip(one, other, strict=True))
    if dataclasses.is_dataclass(one):
        return all(
            same(getattr(one, each.name, None), getattr(other, each.name, None), depth - 1)
            for each in dataclasses.fields(one)
        )
    return False


def snapshot(value: Any, depth: int = _DEPTH) -> Any:
    """A copy of containers, tensors and arrays at any depth; everything else is shared."""
    if depth == 0:
        return value
    if type(value) is Tensor and not _functorch.is_functorch_wrapped_tensor(value) and has_memory(value):
        return value.detach().clone()
    if type(value) is np.ndarray:
        return value.copy()
    if type(value) is dict:
        return {key: snapshot(inner, depth - 1) for key, inner in value.items()}
    if type(value) in (list, tuple, set, deque):
        return type(value)(snapshot(inner, depth - 1) for inner in value)
    return value


def _same_tensors(one: Tensor, other: Tensor) -> bool:
    if any(_functorch.is_functorch_wrapped_tensor(each) for each in (one, other)):
        return False
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    if one.layout != torch.strided or other.layout != torch.strided or not (has_memory(one) and has_memory(other)):
        return False
    return bool(torch.equal(one, other)) or bool(
        ((one == other) | ((one != one) & (other != other))).all()  # NaN equals itself here
    )
