"""The rule of ``nn.LayerNorm``: y = x̂ · w + b, with an x̂ that no parameter enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.engines.ghost.positions import as_autocast_would, over_positions, summed
from lightning_dp.engines.ghost.registry import Arguments, function_rule, rule
from lightning_dp.mechanism.clip import accumulation_dtype


@dataclass(frozen=True)
class LayerNorm:
    """Statistics over the last axes of each position.

    Args:
        shape: the axes that are normalised.
        eps: added to the variance.
    """

    shape: tuple[int, ...]
    eps: float

    takes_copies: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        full = as_autocast_would(x).contiguous()  # the kernel would copy it too, and again on the way back
        output, mean, rstd = torch.native_layer_norm(full, self.shape, weight, bias, self.eps)
        return Output(output, tuple(x.shape), (full.detach(), mean.detach(), rstd.detach()))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        dtype = accumulation_dtype(x.dtype)
        full, mean, rstd = saved

        def products(rows: slice) -> Tensor:
            centred: Tensor = full[rows].to(dtype) - mean[rows].to(dtype)
            return centred.mul_(rstd[rows].to(dtype)).mul_(g[rows])

        return over_positions(products, x, len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Written(summed(g, len(self.shape)))


@rule(nn.LayerNorm)
def layer_norm(layer: nn.LayerNorm, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.LayerNorm``."""
    return LayerNorm(tuple(layer.normalized_shape), layer.eps), x


@function_rule(F.layer_norm)
def _layer_norm_call(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Arguments:
    return LayerNorm(tuple(normalized_shape), eps), input, weight, bias
