"""What the positions of an example add to the gradient of a normalisation's weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.mechanism.clip import accumulation_dtype


def as_autocast_would(x: Tensor) -> Tensor:
    """``x`` as autocast would hand it to a normalisation: in float32."""
    kind = x.device.type
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.float() if casts and x.dtype != torch.float64 else x


IN_CACHE = 1 << 17
"""How many numbers are worked on at a time on a CPU, so that intermediate results need not go to memory and back."""


def over_positions(products: Callable[[slice], Tensor], x: Tensor, axes: int) -> Contribution:
    """Gradients of a weight of so many ``axes``, from what each position adds, for examples of ``x`` at a time."""
    at_a_time = len(x)
    if x.device.type == "cpu":
        at_a_time = max(1, IN_CACHE * len(x) // max(1, x.numel()))
    parts = [summed(products(slice(i, i + at_a_time)), axes) for i in range(0, max(1, len(x)), max(1, at_a_time))]
    return Written(parts[0] if len(parts) == 1 else torch.cat(parts))


def summed(products: Tensor, axes: int) -> Tensor:
    """Sums over the positions of each example, ``(B, *positions, *axes)`` → ``(B, *axes)``, in the accumulation type."""
    between = tuple(range(1, products.ndim - axes))
    dtype = accumulation_dtype(products.dtype)
    return products.sum(between, dtype=dtype) if between else products.to(dtype)
