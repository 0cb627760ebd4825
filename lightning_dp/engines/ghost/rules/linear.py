"""The rule of ``nn.Linear``, y = x Wᵀ + b with any number of leading axes, and of products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import Contribution, Factored, Grams, Norms, Written, gram
from lightning_dp.engines.ghost.fused import FUSED, fused
from lightning_dp.engines.ghost.lost import of_outer
from lightning_dp.engines.ghost.registry import MATRIX, Arguments, function_rule, rule
from lightning_dp.engines.triton.window import PIXEL
from lightning_dp.engines.triton.window import offered as kernels_offered
from lightning_dp.mechanism.clip import row_norms


@dataclass(frozen=True)
class Linear:
    """∂W of an example is Σ_t g_t a_tᵀ over its T positions, ∂b is Σ_t g_t.

    Views of an example, its own batch axis of length one, and positions of a sequence are all positions here.
    """

    takes_copies: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        return Output(F.linear(x.reshape(-1, x.shape[-1]), weight, bias), (*x.shape[:-1], len(weight)))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return of_positions(x.reshape(len(x), -1, x.shape[-1]), g.reshape(len(x), -1, g.shape[-1]), buffers)

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        rows = g.reshape(len(x), -1, g.shape[-1])
        return Written(rows.squeeze(1) if rows.shape[1] == 1 else rows.sum(1))


@dataclass(frozen=True)
class Product(Linear):
    """y = x W + b, the weight lying the other way: ∂W of an example is Σ_t a_t g_tᵀ."""

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        return super().forward(x, weight.t(), bias)

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return of_positions(g.reshape(len(x), -1, g.shape[-1]), x.reshape(len(x), -1, x.shape[-1]), buffers)


@rule(nn.Linear)
def linear(layer: nn.Linear, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.Linear``."""
    return Linear(), x


@function_rule(F.linear)
def _linear_call(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Arguments:
    return Linear(), input, weight, bias


@function_rule(torch.mm, torch.matmul, Tensor.matmul, Tensor.__matmul__)
def _product_call(input: Tensor, other: Tensor) -> Arguments:
    known = isinstance(other, Tensor) and other.ndim == MATRIX and input.ndim > 1
    return Product() if known else None, input, other, None


@function_rule(torch.addmm)
def _sum_and_product_call(input: Tensor, mat1: Tensor, mat2: Tensor, **scales: Any) -> Arguments:
    known = not scales and input.ndim == 1 and len(input) == mat2.shape[1]
    return Product() if known else None, mat1, mat2, input


def of_positions(a: Tensor, g: Tensor, buffers: Buffers) -> Contribution:
    """Σ_t g_t a_tᵀ of each example, written out or in factors; by estimate in factors when 2T² < p·d.

    Args:
        a: inputs, ``(B, T, d)``.
        g: gradients of outputs, ``(B, T, p)``.
        buffers: where to take memory for what is written out, and which of the two is taken.

    Source: the mixed choice of Bu, Mao, Xu 2022 (arXiv 2205.10683), section 4.
    """
    a = a.to(g.dtype)
    if a.shape[1] == 1:
        return Factored(a, g, norms=_outer_norms, total=_total, rows=_rows, bilinear=True)
    numbers, of_factors = a.shape[2] * g.shape[2], a[0].numel() + g[0].numel()
    share = 2 * a.shape[1] ** 2 / numbers
    offered: dict[str, Callable[[Tensor, Tensor], Contribution]] = {
        **({"factors": _factored} if share < NEAR else {}),
        **({"written": partial(_written, buffers)} if share >= 1 or numbers <= HELD * of_factors else {}),
        **({FUSED: _fused} if kernels_offered(g) else {}),
    }
    estimated = "factors" if share < 1 else "written"
    return buffers.forms.choose("positions", a, g, estimated, offered, partial(of_positions, buffers=buffers))


NEAR = 4.0
"""Inner products are timed, too, where they are estimated to take up to so many times as long as gradients written out."""

HELD = 2
"""Gradients are written out, where that is no more than measured to be faster, up to so many times the size of the factors."""


def _factored(a: Tensor, g: Tensor) -> Contribution:
    grams = Grams(lambda a, _: a.shape[1], _write_grams, a.shape[2], g.shape[2])
    return Factored(a, g, norms=grams, total=_total, rows=_rows, bilinear=True)


def _written(buffers: Buffers, a: Tensor, g: Tensor) -> Contribution:
    rows = buffers.take((len(a), g.shape[2], a.shape[2]), like=g)
    return Written(torch.bmm(g.transpose(1, 2), a, out=rows))


def _fused(a: Tensor, g: Tensor) -> Contribution:
    def total(a: Tensor, g: Tensor) -> Tensor:
        return _total(a.squeeze(-1), g.squeeze(-1))

    def rows(a: Tensor, g: Tensor) -> Tensor:
        return _rows(a.squeeze(-1), g.squeeze(-1))

    return fused(a.unsqueeze(-1), g.unsqueeze(-1), PIXEL, total=total, rows=rows)


def _rows(a: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(g.transpose(1, 2), a)


def _total(a: Tensor, g: Tensor) -> Tensor:
    return g.flatten(0, 1).t() @ a.flatten(0, 1).to(g.dtype)


def _outer_norms(a: Tensor, g: Tensor) -> Norms:
    a, g = a.flatten(1), g.flatten(1)
    of_a, of_g = row_norms(a), row_norms(g)
    return Norms(of_a * of_g, of_outer(of_a, a.shape[1], of_g, g.shape[1]))


def _write_grams(a: Tensor, g: Tensor, of_a: Tensor, of_g: Tensor) -> None:
    gram(a, of_a)
    gram(g, of_g)
