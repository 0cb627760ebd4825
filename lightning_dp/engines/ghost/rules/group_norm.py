"""The rules of ``nn.GroupNorm`` and ``nn.InstanceNorm``: y = x̂ · w + b, with an x̂ that no parameter enters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import Contribution
from lightning_dp.engines.ghost.positions import as_autocast_would
from lightning_dp.engines.ghost.registry import Arguments, function_rule, rule


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
        full = as_autocast_would(x)
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


@rule(nn.GroupNorm)
def group_norm(layer: nn.GroupNorm, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.GroupNorm``."""
    return GroupNorm(layer.num_groups, layer.eps), x


@function_rule(F.group_norm)
def _group_norm_call(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Arguments:
    return GroupNorm(num_groups, eps), input, weight, bias


_AXES = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}
"""Kind → the axes of an input with examples. A subclass is not in the table: it may have other axes."""


@rule(*_AXES, when=lambda layer: type(layer) in _AXES and not layer.track_running_stats)
def instance_norm(
    layer: nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d, x: Tensor
) -> tuple[Operation, Tensor]:
    """``nn.InstanceNorm1d``, ``nn.InstanceNorm2d`` and ``nn.InstanceNorm3d``, whose statistics are each example's own."""
    return GroupNorm(layer.num_features, layer.eps, own_axes=x.ndim - _AXES[type(layer)]), x
