"""The rule of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.engines.ghost.linear import of_positions

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Convolution:
    """A convolution over the last axes; the example's own batch axis (of length one, or K views) stays inside a sum.

    Args:
        stride: per axis.
        padding: zeros on both sides, per axis.
        dilation: per axis.
        groups: groups of channels.
        own_axes: axes before the channels in an example's input (its batch axis of length one), 0 or 1.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    own_axes: int = 1

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        convolve = _CONVOLUTIONS[len(self.stride)]
        output = convolve(self._folded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return output, (*x.shape[: 1 + self.own_axes], *output.shape[1:])

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        samples = self._folded(x).to(g.dtype)
        if self.groups == 1 and not any(self.padding) and all(size == 1 for size in weight.shape[2:]):
            reached = samples[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
            contribution = of_positions(_positions(reached, len(x)), _positions(g, len(x)))
            return _Reshaped(contribution, tuple(weight.shape))
        if x.device.type == "cpu":
            return Written(self._one_by_one(samples, g, weight, len(x)))
        return Written(self._in_groups(samples, g, weight, len(x)))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Written(g.flatten(2).sum(2).view(len(x), -1, g.shape[1]).sum(1))

    def _folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.own_axes else x

    def _one_by_one(self, x: Tensor, g: Tensor, weight: Tensor, examples: int) -> Tensor:
        """The kernel of the plain backward pass on slices, straight into one buffer."""
        rows = x.new_empty(examples, *weight.shape)
        own = len(x) // examples
        weight = weight.to(g.dtype)
        for row, one_x, one_g in zip(rows, torch.split(x, own), torch.split(g, own), strict=True):
            row.copy_(self._weight_gradient(one_x, one_g, weight, self.groups))
        return rows

    def _in_groups(self, x: Tensor, g: Tensor, weight: Tensor, examples: int) -> Tensor:
        """All examples in one call, each as a group of channels of its own."""
        own = len(x) // examples

        def side_by_side(t: Tensor) -> Tensor:
            return t.reshape(examples, own, *t.shape[1:]).transpose(0, 1).flatten(1, 2)

        repeated = weight.to(g.dtype).expand(examples, *weight.shape).flatten(0, 1)
        rows = self._weight_gradient(side_by_side(x), side_by_side(g), repeated, examples * self.groups)
        return rows.view(examples, *weight.shape)

    def _weight_gradient(self, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
        gradient: Tensor = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            groups,
            [False, True, False],
        )[1]
        return gradient


def _positions(t: Tensor, examples: int) -> Tensor:
    """``(B · own, C, *)`` as ``(B, T, C)``: an example's own samples are more positions of it."""
    channels_last = t.flatten(2).transpose(1, 2)
    return channels_last.reshape(examples, -1, t.shape[1])


class _Reshaped:
    """A contribution to a matrix, as one to a kernel of the same numbers."""

    def __init__(self, of_matrix: Contribution, shape: tuple[int, ...]) -> None:
        self._of_matrix, self._shape = of_matrix, shape

    def norms(self) -> Tensor:
        return self._of_matrix.norms()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return self._of_matrix.weighted_sum(factors).view(self._shape)

    def rows(self) -> Tensor:
        rows = self._of_matrix.rows()
        return rows.reshape(len(rows), *self._shape)

    def without(self, broken: Tensor) -> Contribution:
        return _Reshaped(self._of_matrix.without(broken), self._shape)
