"""Per-example clipping: bound what one example can add to the sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from lightning_dp.mechanism.adaptive import summed_beside
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.put_off import is_so
from lightning_dp.plan.clipping import Clipping, as_clipping

NORM_BLOCK = 128
"""How many squares are added up one after the other before rounding errors are stopped from growing."""


@cache
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
    norms: Tensor = torch.linalg.vector_norm(torch.stack([row_norms(_rows(g)) for g in gradients.values()]), dim=0)
    return norms


def clip_factors(norms: Tensor, clipping: Clipping | float) -> Tensor:
    """The factor by which each example's gradient, or each layer's part of it, is scaled.

    min(1, C/‖g‖), per layer min(1, (C/√L)/‖g_l‖), or C/(‖g‖ + γ), by the style of ``clipping``.

    Args:
        norms: ``(B,)``, or ``(L, B)`` for the parts in L layers.
        clipping: the style and its numbers; a number C for flat clipping.

    Guarantee:
        ‖factor · g‖ ≤ C for every example up to rounding in the accumulation type (relative 2⁻²⁰ or less), all layers
        together, so adding or removing one example moves the sum by at most C.

    Edge cases:
        ====================  ======================================================
        ‖g‖ = 0               factor 1 (C/γ with the automatic style)
        C = ∞                 factor 1
        ‖g‖ = NaN or ∞        factor 0: the example contributes nothing (see clip_and_sum)
        ‖g_l‖ = NaN or ∞      factor 0 in every layer, likewise
        B = 0                 an empty tensor
        ====================  ======================================================

    Example:
        >>> clip_factors(torch.tensor([0.0, 0.5, 2.0, float("nan")]), 1.0)
        tensor([1.0000, 1.0000, 0.5000, 0.0000])
    """
    clipping = as_clipping(clipping)
    if clipping.style == "automatic":
        factors = clipping.clip_norm / (norms + clipping.gamma)
    else:
        factors = (clipping.budget(len(norms) if norms.ndim > 1 else 1) / norms).clamp(max=1.0)
    broken = ~(norms < torch.inf)
    return factors.masked_fill_(broken.any(0) if norms.ndim > 1 else broken, 0.0)


@dataclass(frozen=True)
class Factors:
    """What each example's gradient is multiplied by, parameter by parameter.

    Attributes:
        by_name: parameter name → factors, ``(B,)``.
        norms: L2 norms before clipping over all parameters together, ``(B,)``.
        broken: ``(B,)`` of bool: the examples whose gradient is not finite. Their factors are 0, and since 0 · NaN is
            NaN, their rows have to be blanked before the weighted sum.
    """

    by_name: dict[str, Tensor]
    norms: Tensor
    broken: Tensor

    @classmethod
    def of(
        cls, norms: Mapping[str, Tensor], names: Iterable[str], clipping: Clipping, counted: int | None = None
    ) -> Factors:
        """The factors that follow from the norms of the parameters' gradients.

        Args:
            norms: parameter name → norms of the examples' gradients, ``(B,)``; at least one. A parameter that is
                missing has a gradient of zero.
            names: of all trainable parameters, which fix the layers and their number.
            clipping: the style and its numbers.
            counted: how many examples count; the others, at the end, are padding and get the factor 0.
        """
        layers = clipping.layers(names)
        together = {layer: [norms[n] for n in layers if layers[n] == layer and n in norms] for layer in layers.values()}
        blank = torch.zeros_like(next(iter(norms.values())))
        parts = torch.stack(
            [torch.linalg.vector_norm(torch.stack(own), dim=0) if own else blank for own in together.values()]
        )
        total = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(parts, dim=0)
        broken = ~(total < torch.inf)
        factors = clip_factors(parts, clipping).masked_fill_(broken, 0.0)
        if counted is not None:
            factors[:, counted:] = 0.0
        of_layer = dict(zip(together, factors, strict=True))
        return cls({name: of_layer[layer] for name, layer in layers.items()}, total, broken)


@full_precision()
def clip_and_sum(
    gradients: Mapping[str, Tensor], clipping: Clipping | float, counted: int | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Clip each example's gradient and add the examples up.

    Args:
        gradients: parameter name → per-example gradients ``(B, *parameter.shape)``, of all trainable parameters. May be
            overwritten.
        clipping: the style and its numbers; a number C for flat clipping to that norm, ``inf`` for none.
        counted: how many examples count; the others, at the end, are padding and contribute exactly zero.

    Returns:
        The sums, parameter name → ``(*parameter.shape)`` in the accumulation type, with those of what adapts C if something
        does (:func:`lightning_dp.mechanism.adaptive.beside`), and the norms before clipping over all parameters together,
        ``(B,)``. An example whose norm is not finite contributes exactly zero; its norm stays
        visible.

    Guarantee:
        L2 sensitivity ``clipping.sensitivity`` under adding or removing one example. No mean is taken.

    Edge cases:
        ====================================  ==============================================================
        a norm whose square overflows         clipped by a norm of scaled squares, see :func:`clip_scaled`
        a norm that overflows                 ∞: the example contributes nothing
        squares that underflow                a norm that is short by at most √P · 2⁻⁶³ (float32), far below any C
        ====================================  ==============================================================
    """
    clipping = as_clipping(clipping)
    rows = {name: _rows(gradient) for name, gradient in gradients.items()}
    factors = Factors.of({name: row_norms(r) for name, r in rows.items()}, gradients, clipping, counted)
    norms, apart = factors.norms, None
    if is_so(factors.broken.any()):
        chosen = factors.broken.nonzero().flatten()
        chosen = chosen if counted is None else chosen[chosen < counted]
        apart, found = clip_scaled({name: gradient[chosen] for name, gradient in gradients.items()}, clipping)
        norms = norms.index_copy(0, chosen, found.to(norms.dtype))
        rows = {name: r.masked_fill(factors.broken.unsqueeze(1), 0.0) for name, r in rows.items()}
    sums = {}
    for name, gradient in gradients.items():
        wide = rows[name].to(accumulation_dtype(gradient.dtype))
        sums[name] = (factors.by_name[name].to(wide.dtype) @ wide).view(gradient.shape[1:])
        if apart is not None:
            sums[name] += apart[name]
    return {**sums, **summed_beside(norms, clipping, counted)}, norms


def clip_scaled(gradients: Mapping[str, Tensor], clipping: Clipping) -> tuple[dict[str, Tensor], Tensor]:
    """:func:`clip_and_sum` for examples of any size, each scaled by a power of two until its squares can be added.

    It takes more passes over the gradients. So it is for the few examples whose squares are too large, or which an engine
    cannot tell the norm of from its factors.

    Args:
        gradients: parameter name → per-example gradients ``(B, *parameter.shape)``, of all trainable parameters.
        clipping: the style and its numbers.

    Returns:
        The sums and the norms, as :func:`clip_and_sum` gives them, without what adapts C: that follows from the norms.

    Guarantee:
        As of :func:`clip_and_sum`. An example contributes exactly zero if a number of its gradient is not finite, or its
        norm is larger than the accumulation type holds.

    Example:
        >>> sums, norms = clip_scaled({"w": torch.tensor([[3e30, 4e30], [3e-30, 4e-30]])}, Clipping(1.0))
        >>> sums["w"], norms
        (tensor([0.6000, 0.8000]), tensor([5.0000e+30, 5.0000e-30]))
    """
    wide = {name: _rows(g).to(accumulation_dtype(g.dtype)) for name, g in gradients.items()}
    largest = torch.stack([_largest(rows) for rows in wide.values()]).amax(0)
    finite = torch.isfinite(largest)
    most = min(_EXPONENTS[rows.dtype] for rows in wide.values())
    exponents = torch.frexp(torch.where(finite, largest, 1.0)).exponent.clamp(-most, most).to(largest.dtype)
    smaller, whole = torch.exp2(-exponents), torch.exp2(exponents)
    scaled = {
        name: (rows * smaller.to(rows.dtype)[:, None]).masked_fill(~finite[:, None], 0.0) for name, rows in wide.items()
    }
    layers = clipping.layers(gradients)
    together = {layer: [row_norms(scaled[n]) for n in layers if layers[n] == layer] for layer in layers.values()}
    parts = torch.stack([torch.linalg.vector_norm(torch.stack(own), dim=0) for own in together.values()])
    norms = torch.linalg.vector_norm(parts, dim=0) * whole
    usable = finite & torch.isfinite(norms)
    if clipping.style == "automatic":
        factors = clipping.clip_norm / (parts + clipping.gamma / whole)
    else:
        factors = torch.minimum(whole, clipping.budget(len(parts)) / parts)
    of_layer = dict(zip(together, torch.where(usable, factors, 0.0), strict=True))
    sums = {
        name: (of_layer[layers[name]].to(rows.dtype) @ rows).view(gradients[name].shape[1:])
        for name, rows in scaled.items()
    }
    return sums, torch.where(finite, norms, torch.inf)


_EXPONENTS = {torch.float32: 120, torch.float64: 1000}
"""Powers of two by which numbers are multiplied at most: the power itself is a normal number, and so is its inverse."""


def _largest(rows: Tensor) -> Tensor:
    """The largest size of a number in each row; NaN if there is one."""
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _rows(gradient: Tensor) -> Tensor:
    """One row for each example, of a parameter of any shape, a single number included: ``(B, P)``."""
    return gradient.unsqueeze(-1).flatten(1)


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, ``(B, P)`` → ``(B,)`` in the accumulation type, by blocks of blocks.

    Adding up the squares of a long row one after the other in float32 loses 10⁻³ of the norm at 10⁷ coordinates
    (Higham 1993, "The accuracy of floating point summation"), and the clip norm would not hold by as much.
    """
    return row_norms_together([rows])


def row_norms_together(parts: Sequence[Tensor]) -> Tensor:
    """:func:`row_norms` of rows that are given in parts, ``(B, P_i)`` each, which are then not put side by side."""
    while len(parts) > 1 or parts[0].shape[1] > NORM_BLOCK:
        blocks = [found for part in parts for found in _norms_of_blocks(part)]
        parts = blocks if len(blocks) == 1 else [torch.cat(blocks, dim=1)]
    wide = accumulation_dtype(parts[0].dtype)
    norms: Tensor = torch.linalg.vector_norm(parts[0], dim=1, dtype=wide)
    return norms


def _norms_of_blocks(rows: Tensor) -> list[Tensor]:
    """Norms of blocks of each row, and of what is left of it; short rows as they are, in the accumulation type."""
    dtype, length = accumulation_dtype(rows.dtype), rows.shape[1]
    if length <= NORM_BLOCK:
        return [rows.to(dtype)]
    block = next((n for n in range(NORM_BLOCK, NORM_BLOCK // 2, -1) if length % n == 0), NORM_BLOCK)
    whole = length // block * block
    blocks = torch.linalg.vector_norm(rows[:, :whole].view(len(rows), -1, block), dim=2, dtype=dtype)
    if whole == length:
        return [blocks]
    return [blocks, torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True, dtype=dtype)]
