"""The rule of ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import (
    ROUNDING,
    Channels,
    Contribution,
    Factored,
    Grams,
    Norms,
    Written,
    gram,
)
from lightning_dp.engines.ghost.fused import FUSED, fused
from lightning_dp.engines.ghost.lost import of_channels
from lightning_dp.engines.ghost.registry import Arguments, Reader, function_rule, rule
from lightning_dp.engines.ghost.rules.linear import HELD, NEAR, of_positions
from lightning_dp.engines.ghost.rules.written_out import FORMS, PLANE, Form
from lightning_dp.engines.triton.window import Window
from lightning_dp.engines.triton.window import offered as kernels_offered
from lightning_dp.mechanism.clip import accumulation_dtype
from lightning_dp.mechanism.put_off import is_so

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, inherited=("forward", "_conv_forward"))
def convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""
    axes = len(layer.stride)
    padding = layer.padding
    if isinstance(padding, str) or layer.padding_mode != "zeros":
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * axes
    own_axes = x.ndim - axes - 1
    return Convolution(layer.stride, tuple(padding), layer.dilation, layer.groups, own_axes), x


def _reader(axes: int) -> Reader:
    """How the arguments of the function for so many axes are read."""

    def read(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Arguments:
        if isinstance(padding, str):
            return None, input, weight, bias
        stride, padding, dilation = (_per_axis(value, axes) for value in (stride, padding, dilation))
        own_axes = input.ndim - axes - 1
        return Convolution(stride, padding, dilation, groups, own_axes, keeps_output=True), input, weight, bias

    return read


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    return tuple(value) * (axes if len(value) == 1 else 1)


for _axes, _function in _CONVOLUTIONS.items():
    function_rule(_function)(_reader(_axes))


@dataclass(frozen=True)
class Convolution:
    """A convolution over the last axes; the example's own batch axis (of length one, or K views) stays inside a sum.

    Args:
        stride: per axis.
        padding: zeros on both sides, per axis.
        dilation: per axis.
        groups: groups of channels.
        own_axes: axes before the channels in an example's input (its batch axis of length one), 0 or 1.
        keeps_output: whether the output is kept, where that spares gradients of a computed weight from being written out.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    own_axes: int = 1
    keeps_output: bool = False

    takes_copies: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        samples, convolve = self._folded(x), _CONVOLUTIONS[len(self.stride)]
        kept = self.keeps_output and self._gram_share(samples, len(samples) // max(len(x), 1), weight) < 1
        given = (self.stride, self.padding, self.dilation, self.groups)
        output = convolve(samples, weight, None if kept else bias, *given)
        saved = None
        if kept:  # apart from what the layer gives, which may be overwritten in place
            saved = output.detach()
            output = output.clone() if bias is None else output + bias.view(-1, *[1] * len(self.stride))
        return Output(output, (*x.shape[: 1 + self.own_axes], *output.shape[1:]), saved)

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        samples = self._folded(x).to(g.dtype)
        if self.groups == 1 and not any(self.padding) and all(size == 1 for size in weight.shape[2:]):
            reached = samples[(slice(None), slice(None), *(slice(None, None, step) for step in self.stride))]
            contribution = of_positions(_positions(reached, len(x)), _positions(g, len(x)), buffers)
            return _Reshaped(contribution, tuple(weight.shape))
        samples, g = (t.reshape(len(x), -1, *t.shape[1:]) for t in (samples, g))
        return self._of_samples(samples, g, weight=weight, saved=saved, buffers=buffers)

    def _of_samples(self, x: Tensor, g: Tensor, *, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """The weight's gradients, from ``(B, own, C, *)`` each, in the form that is in force."""
        written = {
            name: partial(self._written, weight=weight, buffers=buffers, form=form)
            for name, form in FORMS.items()
            if name != "patches" or len(self.stride) <= PLANE
        }
        factored = {"factors": partial(self._factored, weight=weight, saved=saved, buffers=buffers)}
        share, numbers = self._gram_share(x.flatten(0, 1), x.shape[1], weight), x[0].numel() + g[0].numel()
        estimated = "factors" if share < 1 else "slices" if x.device.type == "cpu" else "groups"
        if share < 1 and (self.keeps_output or weight.numel() > HELD * numbers):
            offered = factored
        elif share > NEAR or self.keeps_output:
            offered = written
        else:
            offered = {**factored, **written}
        if kernels_offered(g) and not self.keeps_output:  # whose norms do not suffice where a weight is standardised
            offered = {**offered, FUSED: partial(self._fused, weight=weight, buffers=buffers)}
        again = partial(self._of_samples, weight=weight, saved=None, buffers=buffers)
        return buffers.forms.choose((self, *weight.shape), x, g, estimated, offered, again)

    def _written(self, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers, form: Form) -> Contribution:
        return Written(form(self, x, g, weight.to(g.dtype), buffers))

    def _factored(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        def write(x: Tensor, g: Tensor, of_patches: Tensor, of_gradients: Tensor) -> None:
            self._gram_of_patches(x, g, weight, of_patches)
            gram(_rows_of(g), of_gradients)

        grams = Grams(lambda _, g: g[0, :, 0].numel(), write, weight[0].numel(), g.shape[2])

        def channels(basis: Tensor) -> Channels | None:
            return None if saved is None else self._channels(x, g, weight, saved.view_as(g), basis)

        total, rows = partial(self._total, weight=weight), partial(self._rows, weight=weight, buffers=buffers)
        return Factored(x, g, norms=grams, total=total, rows=rows, channels=channels)

    def _fused(self, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Contribution:
        window = Window(tuple(weight.shape[2:]), self.stride, self.padding, self.dilation, self.groups)
        total, rows = partial(self._total, weight=weight), partial(self._rows, weight=weight, buffers=buffers)
        return fused(x, g, window, total=total, rows=rows)

    def _rows(self, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
        return FORMS["slices" if x.device.type == "cpu" else "groups"](self, x, g, weight.to(g.dtype), buffers)

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        return Written(g.reshape(len(x), -1, g.shape[1], g[0, 0].numel()).sum((1, 3)))

    def _folded(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.own_axes else x

    def _total(self, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
        """The plain gradient of the batch, of output gradients that the factors have scaled."""
        return self.weight_gradient(x.flatten(0, 1).to(g.dtype), g.flatten(0, 1), weight.to(g.dtype), self.groups)

    def _gram_share(self, samples: Tensor, own: int, weight: Tensor) -> float:
        """Multiplications for the Gram norm ÷ what writing an example's gradient out costs on top of the plain.

        The constants (a read or write of a number costs like so many multiplications) were measured on a CPU.
        """
        if self.groups != 1:
            return math.inf
        padded = [n + 2 * pad for n, pad in zip(samples.shape[2:], self.padding, strict=True)]
        kernel = weight.shape[2:]
        reach = [
            (n - d * (k - 1) - 1) // s + 1
            for n, k, d, s in zip(padded, kernel, self.dilation, self.stride, strict=True)
        ]
        pixels, positions = own * math.prod(padded), own * math.prod(reach)
        gram = pixels**2 * samples.shape[1] + positions**2 * (len(weight) + 8 * math.prod(kernel))
        return gram / (80 * weight.numel())

    def _gram_of_patches(self, x: Tensor, g: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
        """⟨patch_t, patch_s⟩, ``(B, T, T)``: a sum of shifted Gram matrices of the pixels, no patch is formed."""
        padded = F.pad(x, [side for pad in reversed(self.padding) for side in (pad, pad)])
        sizes, reach = padded.shape[3:], g.shape[3:]
        of_pixels = gram(_rows_of(padded)).view(len(x), *(x.shape[1], *sizes) * 2)
        positions = x.shape[1] * math.prod(reach)
        if out is None:
            out = of_pixels.new_empty(len(x), positions, positions)
        of_patches = out.view(len(x), *(x.shape[1], *reach) * 2)
        if x.device.type != "cpu":  # one kernel; on a CPU it takes longer than these few
            return self._summed_windows(of_pixels, of_patches, weight.shape[2:], out)
        for place, offset in enumerate(itertools.product(*(range(n) for n in weight.shape[2:]))):
            window = [
                slice(o * d, o * d + s * (n - 1) + 1, s)
                for o, d, s, n in zip(offset, self.dilation, self.stride, reach, strict=True)
            ]
            shifted = of_pixels[(slice(None), slice(None), *window, slice(None), *window)]
            of_patches.add_(shifted) if place else of_patches.copy_(shifted)
        return out

    def _summed_windows(self, of_pixels: Tensor, of_patches: Tensor, kernel: torch.Size, out: Tensor) -> Tensor:
        """All shifted windows as axes of one view, ``(B, own, *, own, *, *kernel)``, summed over the kernel."""
        axes, stride = len(kernel), of_pixels.stride()
        of_rows, of_columns = stride[2 : 2 + axes], stride[3 + axes :]
        places = [
            stride[0],
            stride[1],
            *(one * step for one, step in zip(of_rows, self.stride, strict=True)),
            stride[2 + axes],
            *(one * step for one, step in zip(of_columns, self.stride, strict=True)),
            *((one + other) * d for one, other, d in zip(of_rows, of_columns, self.dilation, strict=True)),
        ]
        windows = of_pixels.as_strided((*of_patches.shape, *kernel), places)
        torch.sum(windows, tuple(range(-axes, 0)), out=of_patches)
        return out

    def _channels(self, x: Tensor, g: Tensor, weight: Tensor, output: Tensor, basis: Tensor) -> Channels | None:
        """Channel c's gradient is G_c = Σ_t g_ct patch_t, so all that is asked for are sums over positions.

        ‖G_c‖² = Σ_ts g_ct g_cs ⟨patch_t, patch_s⟩; ⟨G_c, 1⟩ = Σ_t g_ct ⟨patch_t, 1⟩; ⟨G_c, w_c⟩ = Σ_t g_ct y_ct with the
        output y. The basis spans 1 and w, and its first vector is 1/√n.
        """
        if not x.dtype == g.dtype == output.dtype == weight.dtype == basis.dtype == accumulation_dtype(g.dtype):
            return None
        rows = weight.flatten(1)
        along = torch.bmm(rows.unsqueeze(1), basis).squeeze(1)  # (p, 2): w in the basis
        if is_so((along[:, 0].abs() <= along[:, 1].abs()).logical_not_().any()):
            return None  # w is nearly constant in some channel, and a difference would lose its digits
        of_patches = self._gram_of_patches(x, g, weight)
        by_channel = _rows_of(g).transpose(1, 2)  # (B, p, T)
        squares = torch.bmm(by_channel, of_patches).mul_(by_channel).sum(2).clamp(min=0)
        sizes = torch.linalg.vector_norm(of_patches.flatten(1), dim=1)
        lengths, rounding = by_channel.square().sum(2), ROUNDING * torch.finfo(squares.dtype).eps
        errors = rounding * sizes[:, None] * lengths
        missing = partial(of_channels, sizes, lengths, weight[0].numel(), by_channel.shape[2], rounding)
        summed = x.flatten(0, 1).sum(1, keepdim=True)
        ones = torch.full((1, 1, *weight.shape[2:]), rows.shape[1] ** -0.5, dtype=g.dtype, device=g.device)
        convolve = _CONVOLUTIONS[len(self.stride)]
        of_ones = convolve(summed, ones, None, self.stride, self.padding, self.dilation).view(len(x), -1, 1)
        first = torch.bmm(by_channel, of_ones).squeeze(2)
        with_weight = torch.linalg.vecdot(by_channel, _rows_of(output).transpose(1, 2))
        second = (with_weight - first * along[:, 0]) / along[:, 1]
        return Channels(squares, errors, torch.stack([first, second], dim=2).transpose(0, 1), missing)

    def weight_gradient(self, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The plain gradient, of so many groups of channels."""
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


def _rows_of(t: Tensor) -> Tensor:
    """``(B, own, C, *)`` as ``(B, T, C)``: every position of every own sample."""
    return t.transpose(1, 2).flatten(2).transpose(1, 2)


def _positions(t: Tensor, examples: int) -> Tensor:
    """``(B · own, C, *)`` as ``(B, T, C)``: an example's own samples are more positions of it."""
    channels_last = t.flatten(2).transpose(1, 2)
    return channels_last.reshape(examples, -1, t.shape[1])


class _Reshaped:
    """A contribution to a matrix, as one to a kernel of the same numbers."""

    def __init__(self, of_matrix: Contribution, shape: tuple[int, ...]) -> None:
        self._of_matrix, self._shape = of_matrix, shape

    def norms(self) -> Norms:
        return self._of_matrix.norms()

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return self._of_matrix.weighted_sum(factors).view(self._shape)

    def rows(self) -> Tensor:
        rows = self._of_matrix.rows()
        return rows.reshape(len(rows), *self._shape)

    def without(self, broken: Tensor) -> Contribution:
        return _Reshaped(self._of_matrix.without(broken), self._shape)

    def only(self, index: int) -> Contribution:
        return _Reshaped(self._of_matrix.only(index), self._shape)
