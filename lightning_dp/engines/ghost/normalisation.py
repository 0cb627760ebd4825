"""The rules of normalisations within an example: y = x̂ · w + b, with an x̂ that no parameter enters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Output
from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.mechanism.clip import accumulation_dtype


@dataclass(frozen=True)
class GroupNorm:
    """Statistics per example and group of channels; ``nn.InstanceNorm`` is the case of one channel per group.

    To the kernel, all examples' channels are the channels of one example, with a weight and a bias for each: its backward
    pass then gives every example's gradients of them, at no cost beside the plain one's.

    Args:
        groups: number of groups.
        eps: added to the variance.
        own_axes: axes before the channels in an example's input (its batch axis of length one), 0 or 1.
    """

    groups: int
    eps: float
    own_axes: int = 1

    takes_copies: ClassVar[bool] = True

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        full = _full(x)
        folded = full.flatten(0, 1) if self.own_axes else full
        samples, channels = folded.shape[:2]
        positions = math.prod(folded.shape[2:])
        output, _, _ = torch.native_group_norm(
            folded.reshape(1, samples * channels, positions),
            _for_samples(weight, samples),
            _for_samples(bias, samples),
            1,
            samples * channels,
            positions,
            samples * self.groups,
            self.eps,
        )
        return Output(output, tuple(x.shape))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """Found by the kernel itself."""
        raise AssertionError("the weight's copies have their gradients")

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """Likewise."""
        raise AssertionError("the bias's copies have their gradients")


def _for_samples(copies: Tensor | None, samples: int) -> Tensor | None:
    """``(B, C)`` of B examples as the channels of all their samples, ``(B · own · C,)``."""
    if copies is None:
        return None
    examples, channels = copies.shape
    return copies.unsqueeze(1).expand(examples, samples // max(examples, 1), channels).reshape(-1)


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
        full = _full(x).contiguous()  # the kernel would copy it too, and again on the way back
        output, mean, rstd = torch.native_layer_norm(full, self.shape, weight, bias, self.eps)
        return Output(output, tuple(x.shape), (full.detach(), mean.detach(), rstd.detach()))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        dtype = accumulation_dtype(x.dtype)
        full, mean, rstd = saved

        def products(rows: slice) -> Tensor:
            centred: Tensor = full[rows].to(dtype) - mean[rows].to(dtype)
            return centred.mul_(rstd[rows].to(dtype)).mul_(g[rows])

        return _over_positions(products, x, len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Written(_summed(g, len(self.shape)))


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
        return Output(torch.rms_norm(_full(x), self.shape, weight, self.eps), tuple(x.shape))

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

        return _over_positions(products, x, len(self.shape))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """A root-mean-square norm has none."""
        raise AssertionError("nn.RMSNorm has no bias")


def _full(x: Tensor) -> Tensor:
    """``x`` as autocast would hand it to a normalisation: in float32."""
    return x.float() if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64 else x


IN_CACHE = 1 << 17
"""How many numbers are worked on at a time on a CPU, so that intermediate results need not go to memory and back."""


def _over_positions(products: Callable[[slice], Tensor], x: Tensor, axes: int) -> Contribution:
    """Gradients of a weight of so many ``axes``, from what each position adds, for examples of ``x`` at a time."""
    at_a_time = len(x)
    if x.device.type == "cpu":
        at_a_time = max(1, IN_CACHE * len(x) // max(1, x.numel()))
    parts = [_summed(products(slice(i, i + at_a_time)), axes) for i in range(0, max(1, len(x)), max(1, at_a_time))]
    return Written(parts[0] if len(parts) == 1 else torch.cat(parts))


def _summed(products: Tensor, axes: int) -> Tensor:
    between = tuple(range(1, products.ndim - axes))
    dtype = accumulation_dtype(products.dtype)
    return products.sum(between, dtype=dtype) if between else products.to(dtype)
