"""How much of a gradient's length a norm from factors may be short of, because squares of small numbers are 0.

In float32 the square of a number below 2⁻⁶³ is not held in full. In a gradient that is written out, that is far less than any
clip norm. But a norm that is found from the factors of a gradient multiplies what it has lost of one by the size of the other:
activations of 10⁻²³ and output gradients of 10¹⁸ make a gradient of 10⁻⁵ of which the squares of the activations show nothing.
So a bound of what may be missing goes with such norms, and examples for which it is not negligible are written out.

A bound also covers the weighted sum, where factors of at most 1 (C/γ in the automatic style) are multiplied into one of the
two: of what that loses to underflow, what is lost by the square is a multiple.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.mechanism.put_off import is_so
from lightning_dp.plan.clipping import Clipping

NEGLIGIBLE = 2.0**-11
"""What is missing stands at a right angle to what is there: of a norm's square it is the square of this, less than rounding."""


@dataclass(frozen=True)
class Lost:
    """The length that may be missing of B norms.

    It is a few operations to compute and nearly always far from mattering, so that there is a cruder bound too, which takes
    next to none.

    Attributes:
        sizes: of which ``part · (terms + Σ size)`` is no less than it, ``(B,)`` each.
        part: see there.
        exactly: computes it, ``(B,)``.
        terms: see there.
    """

    sizes: tuple[Tensor, ...]
    part: float
    exactly: Callable[[], Tensor]
    terms: int


def uncertain(found: Sequence[Lost], broken: Tensor, clipping: Clipping, names: Iterable[str]) -> Tensor | None:
    """Whose norms are not finite or may be short of something that counts.

    Args:
        found: what may be missing of the norms of parameters.
        broken: whose norms are not finite, ``(B,)`` of bool.
        clipping: the style and its numbers.
        names: of all trainable parameters.

    Returns:
        ``(B,)`` of bool; ``None`` if there are none.
    """
    may_miss = NEGLIGIBLE * clipping.budget(len(set(clipping.layers(names).values())))
    if clipping.style == "automatic":
        may_miss = min(may_miss, NEGLIGIBLE * clipping.gamma)
    suspect = broken
    if found:
        sizes = [size for one in found for size in one.sizes]
        most = may_miss / max(one.part for one in found) - sum(one.terms for one in found)
        suspect = broken | ~(torch.stack(sizes).sum(0) <= most)
    if not is_so(suspect.any()):
        return None
    if found:
        suspect = broken | ~(torch.stack([one.exactly() for one in found]).sum(0) <= may_miss)
    return suspect if bool(suspect.any()) else None


def held(count: int, dtype: torch.dtype) -> float:
    """The length of which a sum of ``count`` squares may show nothing."""
    return math.sqrt(count * torch.finfo(dtype).tiny)


def of_outer(a: Tensor, a_count: int, g: Tensor, g_count: int) -> Lost:
    """What may be missing of ‖a‖ · ‖g‖, from these norms, ``(B,)``, of so many numbers each."""
    of_a, of_g = held(a_count, a.dtype), held(g_count, g.dtype)
    return Lost((a, g), max(of_a, of_g), lambda: (a + of_a) * of_g + of_a * g, 2)


def of_grams(a: Tensor, g: Tensor, counts: Sequence[tuple[int, int]], positions: int, rounding: float) -> Lost:
    """What may be missing of (Σ_l Σ_ts A_ts G_ts + rounding · ‖A‖ ‖G‖)^½, over layers l.

    Every A_ts may be wrong by d · tiny if it is a sum of d products, so that the sum may be by T · d · tiny · ‖G‖; the same
    with A and G exchanged. And their norms are sums of squares too.

    Args:
        a: ‖A‖ as it was found, ``(L, B)``.
        g: ‖G‖, likewise.
        counts: of each layer, how many products make a number of A, 0 if it is exact, and of G.
        positions: T.
        rounding: relative to ‖A‖ ‖G‖.
    """
    short = positions * held(1, a.dtype)  # of ‖A‖ or ‖G‖, at a right angle to what is there
    small = held(positions, a.dtype)

    def exactly() -> Tensor:
        of_a, of_g = (torch.tensor(one, dtype=a.dtype, device=a.device)[:, None] for one in zip(*counts, strict=True))
        longest_a, longest_g = (a + short).sqrt(), (g + short).sqrt()
        of_products = small * (of_a.sqrt() * longest_g + of_g.sqrt() * longest_a)
        of_sizes = _short_by(short, a).sqrt() * longest_g + _short_by(short, g).sqrt() * longest_a
        missing: Tensor = (of_products + rounding**0.5 * of_sizes).sum(0)
        return missing

    most = max(map(max, counts))
    sizes = (a.sum(0), g.sum(0)) if len(counts) > 1 else (a[0], g[0])
    return Lost(sizes, small * most**0.5 + (rounding * short) ** 0.5, exactly, 2 * len(counts))


def of_channels(a: Tensor, squares: Tensor, count: int, positions: int, rounding: float, scale: Tensor) -> Lost:
    """What may be missing of (Σ_c α_c² (Σ_ts A_ts g_ct g_cs + rounding · ‖A‖ ‖g_c‖²))^½, over channels c.

    Args:
        a: ‖A‖ as it was found, ``(B,)``.
        squares: ‖g_c‖², ``(B, p)``.
        count: how many products make a number of A.
        positions: T.
        rounding: relative to ‖A‖ ‖g_c‖².
        scale: α, ``(p,)``.
    """
    short, of_g = positions * held(1, a.dtype), held(positions, a.dtype)
    products, channels = count**0.5 + positions**0.25, squares.shape[1]

    def exactly() -> Tensor:
        longest, lengths = (a[:, None] + short).sqrt(), squares.sqrt() + of_g
        of_products = of_g * (products * (lengths + lengths.sqrt()) + positions**0.25 * longest)
        of_sizes = _short_by(short, a)[:, None].sqrt() * lengths
        missing: Tensor = (of_products + rounding**0.5 * of_sizes) @ scale.abs()
        return missing

    largest = scale.abs().amax()
    crude = largest * (4 * squares.sum(1) + channels * (a + 8))
    return Lost((crude,), products * of_g + (rounding * short) ** 0.5, exactly, 1)


def of_rows(count: int, scale: Tensor, examples: int) -> Lost:
    """What may be missing of (Σ_c α_c² ‖G_c‖²)^½ for channels of ``count`` numbers that are written out.

    Args:
        count: n.
        scale: α, ``(p,)``.
        examples: B.
    """
    total = scale.abs().sum().expand(examples)
    part = held(count, scale.dtype)
    return Lost((total,), part, lambda: part * total, 1)


def _short_by(short: float, norm: Tensor) -> Tensor:
    """(‖·‖² + short²)^½ − ‖·‖ at most."""
    return short * (short / norm).clamp(max=1.0)
