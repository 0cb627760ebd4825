"""The rule of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Output
from lightning_dp.engines.ghost.contribution import Contribution, Factored, Written, gram, gram_norms
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

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        convolve = _CONVOLUTIONS[len(self.stride)]
        output = convolve(self._folded(x), weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return Output(output, (*x.shape[: 1 + self.own_axes], *output.shape[1:]))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        samples = self._folded(x).to(g.dtype)
        if self.groups == 1 and not any(self.padding) and all(size == 1 for size in weight.shape[2:]):
            reached = samples[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
            contribution = of_positions(_positions(reached, len(x)), _positions(g, len(x)))
            return _Reshaped(contribution, tuple(weight.shape))
        own = (len(x), -1)
        samples, g = (t.reshape(*own, *t.shape[1:]) for t in (samples, g))
        rows, total = partial(self._rows, weight=weight, buffers=buffers), partial(self._total, weight=weight)
        if self.groups == 1 and self._gram_is_cheaper(samples, g, weight):
            return Factored(
                samples, g, norms=partial(self._gram_norms, kernel=weight.shape[2:]), total=total, rows=rows
            )
        return Written(rows(samples, g))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Written(g.flatten(2).sum(2).view(len(x), -1, g.shape[1]).sum(1))

    def _folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.own_axes else x

    def _rows(self, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
        """Gradients written out, from ``(B, own, C, *)`` each.

        On a CPU the kernel of the plain backward pass on slices, straight into one buffer; elsewhere all examples in one
        call, each as a group of channels of its own.
        """
        weight = weight.to(g.dtype)
        if x.device.type == "cpu":
            rows = buffers.take((len(x), *weight.shape), like=x)
            for row, one_x, one_g in zip(rows, x, g, strict=True):
                row.copy_(self._weight_gradient(one_x, one_g, weight, self.groups))
            return rows
        x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))
        examples = g.shape[1] // len(weight)
        repeated = weight.expand(examples, *weight.shape).flatten(0, 1)
        return self._weight_gradient(x, g, repeated, examples * self.groups).view(examples, *weight.shape)

    def _total(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """The plain gradient of the batch, of output gradients that the factors have scaled."""
        return self._weight_gradient(x.flatten(0, 1).to(g.dtype), g.flatten(0, 1), weight.to(g.dtype), self.groups)

    def _gram_is_cheaper(self, x: Tensor, g: Tensor, weight: Tensor) -> bool:
        """Multiplications for the Gram norm against what writing an example's gradient out costs on top of the plain.

        The constants (a read or write of a number costs like so many multiplications) were measured on a CPU.
        """
        pixels = math.prod((x.shape[1], *(n + 2 * pad for n, pad in zip(x.shape[3:], self.padding, strict=True))))
        positions = g.shape[1] * math.prod(g.shape[3:])
        offsets = math.prod(weight.shape[2:])
        gram = pixels**2 * x.shape[2] + positions**2 * (g.shape[2] + 8 * offsets)
        return gram < 80 * weight.numel()

    def _gram_norms(self, x: Tensor, g: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """Norms from Gram matrices; that of the patches is a sum of shifted ones of the pixels, no patch is formed."""
        padded = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        sizes, reach = padded.shape[3:], g.shape[3:]
        of_pixels = gram(padded.transpose(1, 2).flatten(2).transpose(1, 2))
        of_pixels = of_pixels.view(len(x), *(x.shape[1], *sizes) * 2)
        of_patches = of_pixels.new_zeros(len(x), *(x.shape[1], *reach) * 2)
        for offset in itertools.product(*(range(n) for n in kernel)):
            window = [
                slice(o * d, o * d + s * (n - 1) + 1, s)
                for o, d, s, n in zip(offset, self.dilation, self.stride, reach, strict=True)
            ]
            of_patches += of_pixels[(slice(None), slice(None), *window, slice(None), *window)]
        positions = x.shape[1] * math.prod(reach)
        of_gradients = gram(g.transpose(1, 2).flatten(2).transpose(1, 2))
        return gram_norms(of_patches.reshape(len(x), positions, positions), of_gradients)

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
