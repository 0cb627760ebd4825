"""The rules of normalisations within an example: y = x̂ · w + b, with an x̂ that no parameter enters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Output
from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.functional.clip import accumulation_dtype


@dataclass(frozen=True)
class GroupNorm:
    """Statistics per example and group of channels; ``nn.InstanceNorm`` is the case of one channel per group.

    ∂w of a channel is Σ_t g_t x̂_t = rstd · (Σ_t g_t x_t − mean · Σ_t g_t): two sums, and x̂ is never formed.

    Args:
        groups: number of groups.
        eps: added to the variance.
        own_axes: axes before the channels in an example's input (its batch axis of length one), 0 or 1.
    """

    groups: int
    eps: float
    own_axes: int = 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        folded = self._folded(_full(x))
        samples, channels = folded.shape[:2]
        output, mean, rstd = torch.native_group_norm(
            folded, weight, bias, samples, channels, math.prod(folded.shape[2:]), self.groups, self.eps
        )
        return Output(output, tuple(x.shape), (mean.detach(), rstd.detach()))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        folded = _positions(self._folded(x)).to(g.dtype)
        g = _positions(g)
        dtype = accumulation_dtype(g.dtype)
        members = folded.shape[1] // self.groups
        mean, rstd = (statistic.to(dtype).repeat_interleave(members, 1) for statistic in saved)
        of_products = torch.linalg.vecdot(g.to(dtype), folded.to(dtype))
        rows = rstd * (of_products - mean * g.sum(2, dtype=dtype))
        return Written(rows.view(len(x), -1, rows.shape[1]).sum(1))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        sums = _positions(g).sum(2, dtype=accumulation_dtype(g.dtype))
        return Written(sums.view(len(x), -1, sums.shape[1]).sum(1))

    def _folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.own_axes else x


@dataclass(frozen=True)
class LayerNorm:
    """Statistics over the last axes of each position.

    Args:
        shape: the axes that are normalised.
        eps: added to the variance.
    """

    shape: tuple[int, ...]
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        output, mean, rstd = torch.native_layer_norm(_full(x), self.shape, weight, bias, self.eps)
        return Output(output, tuple(x.shape), (mean.detach(), rstd.detach()))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        full = x.to(accumulation_dtype(x.dtype))
        mean, rstd = (statistic.to(full.dtype) for statistic in saved)
        return _over_positions((full - mean).mul_(rstd).mul_(g), len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return _over_positions(g.to(accumulation_dtype(g.dtype)), len(self.shape))


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square over the last axes of each position; no mean is taken off and there is no bias.

    Args:
        shape: the axes that are normalised.
        eps: added to the mean square; ``None`` for the machine epsilon of the input's type.
    """

    shape: tuple[int, ...]
    eps: float | None

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Output(torch.rms_norm(_full(x), self.shape, weight, self.eps), tuple(x.shape))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        full = x.to(accumulation_dtype(x.dtype))
        eps = torch.finfo(full.dtype).eps if self.eps is None else self.eps
        mean_square = full.square().mean(dim=tuple(range(-len(self.shape), 0)), keepdim=True)
        return _over_positions(full.mul(mean_square.add_(eps).rsqrt_()).mul_(g), len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """A root-mean-square norm has none."""
        raise AssertionError("nn.RMSNorm has no bias")


def _full(x: Tensor) -> Tensor:
    """``x`` as autocast would hand it to a normalisation: in float32."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x


def _positions(t: Tensor) -> Tensor:
    """``(N, C, *)`` as ``(N, C, T)``."""
    return t.flatten(2) if t.ndim > 2 else t.unsqueeze(-1)


def _over_positions(products: Tensor, axes: int) -> Contribution:
    between = tuple(range(1, products.ndim - axes))
    return Written(products.sum(between) if between else products)
