"""Per-example clipping: bound what one example can add to the sum."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

NORM_BLOCK = 128
"""How many squares are added up one after the other before rounding errors are stopped from growing."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which norms and sums are kept: float32, or float64 for float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def per_example_norms(gradients: Mapping[str, Tensor]) -> Tensor:
    """L2 norm of each example's gradient over all parameters together.

    Args:
        gradients: parameter name → per-example gradients of shape ``(B, *parameter.shape)``.

    Returns:
        Norms of shape ``(B,)``, computed in float32 (float64 for float64 gradients) whatever the gradients' type.
    """
    norms: Tensor = torch.linalg.vector_norm(torch.stack([_row_norms(_rows(g)) for g in gradients.values()]), dim=0)
    return norms


def clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    """The factor min(1, C/‖g‖) by which each example's gradient is scaled (Abadi et al. 2016, Algorithm 1).

    Guarantee:
        ‖factor · g‖ ≤ C for every example up to rounding in the accumulation type (relative 2⁻²⁰ or less), so adding
        or removing one example moves the sum by at most C.

    Edge cases:
        ====================  ======================================================
        ‖g‖ = 0               factor 1
        C = ∞                 factor 1
        ‖g‖ = NaN or ∞        factor 0: the example contributes nothing (see clip_and_sum)
        B = 0                 an empty tensor
        ====================  ======================================================

    Example:
        >>> clip_factors(torch.tensor([0.0, 0.5, 2.0, float("nan")]), 1.0)
        tensor([1.0000, 1.0000, 0.5000, 0.0000])
    """
    factors = (clip_norm / norms).clamp(max=1.0)
    return torch.where(torch.isfinite(norms), factors, torch.zeros_like(factors))


def clip_and_sum(gradients: Mapping[str, Tensor], clip_norm: float) -> tuple[dict[str, Tensor], Tensor]:
    """Clip each example's gradient to L2 norm ``clip_norm`` and add the examples up.

    Args:
        gradients: parameter name → per-example gradients ``(B, *parameter.shape)``. May be overwritten.
        clip_norm: C > 0; ``inf`` for no clipping.

    Returns:
        The sums, parameter name → ``(*parameter.shape)`` in the accumulation type, and the norms before clipping,
        ``(B,)``. An example whose norm is not finite contributes exactly zero; its norm stays visible.

    Guarantee:
        L2 sensitivity C under adding or removing one example. No mean is taken.
    """
    norms = per_example_norms(gradients)
    factors = clip_factors(norms, clip_norm)
    if not bool(torch.isfinite(norms).all()):  # 0 · NaN is NaN: blank those rows before the weighted sum
        broken = ~torch.isfinite(norms)
        gradients = {
            name: gradient.masked_fill(broken.view(-1, *[1] * (gradient.ndim - 1)), 0.0)
            for name, gradient in gradients.items()
        }
    sums = {}
    for name, gradient in gradients.items():
        rows = _rows(gradient).to(accumulation_dtype(gradient.dtype))
        sums[name] = (factors.to(rows.dtype) @ rows).view(gradient.shape[1:])
    return sums, norms


def _rows(gradient: Tensor) -> Tensor:
    """One row for each example, of a parameter of any shape, a single number included: ``(B, P)``."""
    return gradient.unsqueeze(-1).flatten(1)


def _row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, by blocks of blocks.

    Adding up the squares of a long row one after the other in float32 loses 10⁻³ of the norm at 10⁷ coordinates
    (Higham 1993, "The accuracy of floating point summation"), and the clip norm would not hold by as much.
    """
    dtype = accumulation_dtype(rows.dtype)
    while rows.shape[1] > NORM_BLOCK:
        whole = rows.shape[1] // NORM_BLOCK * NORM_BLOCK
        blocks = torch.linalg.vector_norm(rows[:, :whole].view(len(rows), -1, NORM_BLOCK), dim=2, dtype=dtype)
        rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True, dtype=dtype)
        rows = torch.cat([blocks, rest], dim=1)
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    return norms
