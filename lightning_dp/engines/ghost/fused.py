"""Gradients that are never written out: one kernel finds their norms, and one plain product their weighted sum."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lightning_dp.engines.ghost.contribution import ROUNDING, Factored, Norms
from lightning_dp.engines.ghost.lost import of_outer
from lightning_dp.engines.triton.window import Window
from lightning_dp.mechanism.clip import accumulation_dtype

FUSED = "fused"
"""The name of the form."""


def fused(
    x: Tensor,
    g: Tensor,
    window: Window,
    *,
    total: Callable[[Tensor, Tensor], Tensor],
    rows: Callable[[Tensor, Tensor], Tensor],
) -> Factored:
    """A contribution whose norms are those of :func:`norms`.

    Args:
        x: inputs, ``(B, own, C, *)``.
        g: output gradients, ``(B, own, p, *)``.
        window: of the convolution.
        total: see :class:`lightning_dp.engines.ghost.contribution.Factored`.
        rows: likewise.
    """
    return Factored(x, g, norms=lambda x, g: norms(x, g, window), total=total, rows=rows)


def norms(x: Tensor, g: Tensor, window: Window) -> Norms:
    """‖Σ_t g_t patch_tᵀ‖ of each example, rounded up.

    A number of the gradient is a sum over positions, whose terms may nearly cancel. What is then clipped is added up once more,
    in another order, so a multiple of what rounding does to numbers of the size ‖g‖ ‖patches‖ is added.

    Args:
        x: ``(B, own, C, *)``.
        g: ``(B, own, p, *)``.
        window: of the convolution.
    """
    from lightning_dp.engines.triton.squares import tiles

    dtype = accumulation_dtype(g.dtype)
    if not len(x):
        return Norms(g.new_zeros(0, dtype=dtype))
    lengths, sizes, of_patches, of_g = torch.linalg.vector_norm(tiles(x, g, window), dim=2)
    positions = g[0].numel() // g.shape[2]
    numbers = positions * x.shape[2] * math.prod(window.kernel)
    values = lengths + ROUNDING * torch.finfo(dtype).eps * sizes
    return Norms(values, of_outer(of_patches, numbers, of_g, g[0].numel()))
