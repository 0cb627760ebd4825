"""From named sums to one flat vector, and one sum over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

AllReduceSum = Callable[[Tensor], Tensor]
"""Adds a tensor up over all ranks and gives every rank the total, or its part of the total. Never a mean."""


def no_reduce(tensor: Tensor) -> Tensor:
    """The sum over one rank."""
    return tensor


def flatten(tensors: Mapping[str, Tensor]) -> Tensor:
    """One vector of all tensors, in the mapping's order, which must be the same on every rank."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors.values()])


def unflatten(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`flatten`, shaped and typed like ``like``."""
    parts = torch.split(flat, [tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape).to(tensor.dtype) for (name, tensor), part in zip(like.items(), parts, strict=True)
    }
