"""What a layer's call adds to each example's gradient of one parameter, written out or kept in factors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lightning_dp.engines.ghost.lost import Lost, of_grams
from lightning_dp.mechanism.clip import accumulation_dtype, row_norms

ROUNDING = 8.0
"""Units in the last place by which a norm from Gram matrices is rounded up, see :func:`gram_norms`."""


class Norms(NamedTuple):
    """Norms of B gradients.

    Attributes:
        values: L2 norms, ``(B,)``, in the accumulation type.
        lost: the length that may be missing of them; ``None`` for none.
    """

    values: Tensor
    lost: Lost | None = None


class Contribution(Protocol):
    """The gradients of B examples with respect to one parameter."""

    def norms(self) -> Norms:
        """How long they are."""
        ...

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """Σ factors[i] · gradient i, in the parameter's shape and the accumulation type."""
        ...

    def rows(self) -> Tensor:
        """The gradients themselves, ``(B, *parameter.shape)``."""
        ...

    def without(self, broken: Tensor) -> Contribution:
        """The same with zeros for the examples where ``broken``, ``(B,)``, is true, whatever stands there."""
        ...

    def only(self, index: int) -> Contribution:
        """The gradient of one example."""
        ...


class Written:
    """Gradients written out.

    Args:
        gradients: ``(B, *parameter.shape)``.
    """

    def __init__(self, gradients: Tensor) -> None:
        self._gradients = gradients

    @property
    def flat(self) -> Tensor:
        """One row for each example, ``(B, P)``."""
        return self._gradients.unsqueeze(-1).flatten(1)

    def norms(self) -> Norms:
        """See :class:`Contribution`."""
        return Norms(row_norms(self.flat))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """See :class:`Contribution`."""
        flat = self.flat.to(accumulation_dtype(self._gradients.dtype))
        total: Tensor = (factors.to(flat.dtype) @ flat).view(self._gradients.shape[1:])
        return total

    def rows(self) -> Tensor:
        """See :class:`Contribution`."""
        return self._gradients

    def without(self, broken: Tensor) -> Contribution:
        """See :class:`Contribution`."""
        return Written(blank(self._gradients, broken))

    def only(self, index: int) -> Contribution:
        """See :class:`Contribution`."""
        return Written(self._gradients[index : index + 1])


@dataclass(frozen=True)
class Channels:
    """What the way back through a projection needs to know of B gradients with p channels of n numbers.

    Attributes:
        squares: squared norm of each channel, ``(B, p)``.
        errors: how far rounding may have made those too small, ``(B, p)``.
        components: of each channel along two vectors of its own, ``(p, B, 2)``.
        lost: what may be missing of their norm together, from what each is multiplied by.
    """

    squares: Tensor
    errors: Tensor
    components: Tensor
    lost: Callable[[Tensor], Lost]

    def without(self, broken: Tensor) -> Channels:
        """The same with zeros for the examples where ``broken``, ``(B,)``, is true."""
        components = blank(self.components.transpose(0, 1), broken).transpose(0, 1)
        return Channels(blank(self.squares, broken), blank(self.errors, broken), components, self.lost)


@dataclass(frozen=True)
class Grams:
    """Norms by the Gram matrices of both factors, see :func:`gram_norms`.

    Attributes:
        positions: (a, g) → T.
        write: writes both, ``(B, T, T)`` in the accumulation type, for (a, g, memory of the first, memory of the second).
        of_inputs: how many products make a number of the first; 0 if its numbers are exact.
        of_gradients: how many make one of the second.
    """

    positions: Callable[[Tensor, Tensor], int]
    write: Callable[[Tensor, Tensor, Tensor, Tensor], None]
    of_inputs: int
    of_gradients: int

    def norms(self, a: Tensor, g: Tensor) -> Norms:
        """The norms of one contribution."""
        count = self.positions(a, g)
        space = g.new_empty(2, 1, len(g), count, count, dtype=accumulation_dtype(g.dtype))
        self.write(a, g, space[0, 0], space[1, 0])
        return gram_norms(space, [(self.of_inputs, self.of_gradients)])


class Factored:
    """Gradients that are a function of two factors, such as Σ_t g_t a_tᵀ, kept in factors because those are smaller.

    Args:
        inputs: a, with a leading axis of B.
        gradients: g, with a leading axis of B.
        norms: (a, g) → the norms; or how they follow from Gram matrices.
        total: (a, factors · g) → the weighted sum. It is linear in g.
        bilinear: whether it is linear in a too, so that the factors may go to whichever is smaller.
        rows: (a, g) → the gradients written out.
        channels: basis, ``(p, n, 2)`` → what is known of the channels without writing them out, or ``None`` if nothing
            exact is.
    """

    def __init__(
        self,
        inputs: Tensor,
        gradients: Tensor,
        *,
        norms: Callable[[Tensor, Tensor], Norms] | Grams,
        total: Callable[[Tensor, Tensor], Tensor],
        rows: Callable[[Tensor, Tensor], Tensor],
        bilinear: bool = False,
        channels: Callable[[Tensor], Channels | None] = lambda _: None,
    ) -> None:
        self._inputs, self._gradients = inputs, gradients
        self._norms, self._total, self._rows, self._bilinear = norms, total, rows, bilinear
        self.channels = channels

    @property
    def grams(self) -> Grams | None:
        """How the norms follow from Gram matrices, if they do."""
        return self._norms if isinstance(self._norms, Grams) else None

    def gram_space(self) -> tuple[int, int, torch.dtype, torch.device]:
        """B, T, type and device of the Gram matrices."""
        assert isinstance(self._norms, Grams)
        a, g = self._inputs, self._gradients
        return len(g), self._norms.positions(a, g), accumulation_dtype(g.dtype), g.device

    def write_grams(self, of_inputs: Tensor, of_gradients: Tensor) -> None:
        """Write both Gram matrices into this memory, ``(B, T, T)`` each."""
        assert isinstance(self._norms, Grams)
        self._norms.write(self._inputs, self._gradients, of_inputs, of_gradients)

    def norms(self) -> Norms:
        """See :class:`Contribution`."""
        of = self._norms.norms if isinstance(self._norms, Grams) else self._norms
        return of(self._inputs, self._gradients)

    def weighted_sum(self, factors: Tensor) -> Tensor:
        """See :class:`Contribution`."""
        dtype = accumulation_dtype(self._gradients.dtype)
        inputs, gradients = self._inputs, self._gradients.to(dtype)
        if self._bilinear and inputs.numel() < gradients.numel():
            return self._total(_scaled(inputs.to(dtype), factors), gradients)
        return self._total(inputs, _scaled(gradients, factors))

    def rows(self) -> Tensor:
        """See :class:`Contribution`."""
        return self._rows(self._inputs, self._gradients)

    def without(self, broken: Tensor) -> Contribution:
        """See :class:`Contribution`."""
        return self._of(blank(self._inputs, broken), blank(self._gradients, broken))

    def only(self, index: int) -> Contribution:
        """See :class:`Contribution`."""
        return self._of(self._inputs[index : index + 1], self._gradients[index : index + 1])

    def _of(self, inputs: Tensor, gradients: Tensor) -> Factored:
        return Factored(
            inputs, gradients, norms=self._norms, total=self._total, rows=self._rows, bilinear=self._bilinear
        )


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    return rows * factors.to(rows.dtype).view(-1, *[1] * (rows.ndim - 1))


def merged(contributions: Sequence[Contribution]) -> Contribution:
    """The contributions of several calls to one parameter as one: a sum of gradients, not of norms."""
    if len(contributions) == 1:
        return contributions[0]
    total = contributions[0].rows()
    for contribution in contributions[1:]:
        total = total + contribution.rows()
    return Written(total)


def blank(rows: Tensor, broken: Tensor) -> Tensor:
    """``rows`` with zeros where ``broken``, ``(B,)``, is true."""
    blanked: Tensor = rows.masked_fill(broken.view(-1, *[1] * (rows.ndim - 1)), 0)
    return blanked


def gram_norms(space: Tensor, counts: Sequence[tuple[int, int]]) -> Norms:
    """(Σ_l ‖Σ_t g_t a_tᵀ‖²)^½ of each example over L layers, each by Σ_ts ⟨a_t, a_s⟩ ⟨g_t, g_s⟩.

    The sum is rounded *up*, by a multiple of the two matrices' sizes. Where a_t and g_t nearly cancel, the sum is much
    smaller than its terms and rounding errors would otherwise let the norm come out too short, and the example be
    clipped too little.

    Args:
        space: ⟨a_t, a_s⟩ and ⟨g_t, g_s⟩, ``(2, L, B, T, T)``, in the accumulation type.
        counts: of each layer, how many products make a number of the first, 0 if its numbers are exact, and of the second.

    Source: Goodfellow 2015 (arXiv 1510.01799); Li, Tramèr, Liang, Hashimoto 2021 (arXiv 2110.05679), section 4; Bu, Mao, Xu
    2022 (arXiv 2205.10683).
    """
    flat = space.flatten(3)
    squares = torch.linalg.vecdot(flat[0], flat[1])
    sizes = torch.linalg.vector_norm(flat, dim=3)
    rounding, (a, g) = ROUNDING * torch.finfo(squares.dtype).eps, sizes
    values = squares.clamp_(min=0).addcmul_(a, g, value=rounding)
    missing = of_grams(a, g, counts, space.shape[-1], rounding)
    return Norms((values[0] if len(values) == 1 else values.sum(0)).sqrt_(), missing)


def gram(rows: Tensor, out: Tensor | None = None) -> Tensor:
    """⟨r_t, r_s⟩ of each example's T rows, ``(B, T, D)`` → ``(B, T, T)``, in the accumulation type.

    Args:
        rows: r.
        out: where to write them.
    """
    rows = rows.to(accumulation_dtype(rows.dtype))
    products: Tensor = torch.bmm(rows, rows.transpose(1, 2), out=out)
    return products
