"""The rule of ``nn.RMSNorm``: y = x̂ · w, with an x̂ that no parameter enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import Contribution
from lightning_dp.engines.ghost.positions import as_autocast_would, over_positions
from lightning_dp.engines.ghost.registry import rule
from lightning_dp.mechanism.clip import accumulation_dtype


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square over the last axes of each position; no mean is taken off and there is no bias.

    Args:
        shape: the axes that are normalised.
        eps: added to the mean square; ``None`` for the machine epsilon of the input's type.
    """

    shape: tuple[int, ...]
    eps: float | None

    takes_copies: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Output(torch.rms_norm(as_autocast_would(x), self.shape, weight, self.eps), tuple(x.shape))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        dtype = accumulation_dtype(x.dtype)
        eps = torch.finfo(dtype).eps if self.eps is None else self.eps

        def products(rows: slice) -> Tensor:
            full = x[rows].to(dtype)
            mean_square = full.square().mean(dim=tuple(range(-len(self.shape), 0)), keepdim=True)
            normalised: Tensor = full.mul(mean_square.add_(eps).rsqrt_())
            normalised *= g[rows]
            return normalised

        return over_positions(products, x, len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """A root-mean-square norm has none."""
        raise AssertionError("nn.RMSNorm has no bias")


@rule(nn.RMSNorm)
def rms_norm(layer: nn.RMSNorm, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.RMSNorm``."""
    return RMSNorm(tuple(layer.normalized_shape), layer.eps), x
