"""Convolutions whose weights are standardised on every use."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.layers.standardised_weights import standardise


class WSConv2d(nn.Conv2d):
    """A 2-d convolution with scaled weight standardisation, a learnable gain and a bias.

    The weight used is Ŵ = (w − mean(w)) · gain · rsqrt(max(var(w) · fan_in, 1e-4)) with the mean and the population
    variance over each output channel's fan_in = kernel height · kernel width · input channels / groups numbers. So each
    output channel's weights have mean zero and sum of squares gain², whatever the optimizer or the noise did to w: the
    convolution of independent inputs of unit variance has unit variance.

    Gain (``(out_channels,)``, from ones) and bias (from zeros) are parameters like any other: they count in the clip
    norm. Each example's output depends on the example alone, so nothing speaks against it under differential privacy.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: height and width of the kernel.
        stride: step of the kernel.
        padding: zeros added on every side.
        dilation: distance of neighbouring kernel elements.
        groups: blocks of channels that do not see one another.

    Example:
        >>> convolution = WSConv2d(3, 8, 3, padding=1)
        >>> weight = convolution.standardised_weight()
        >>> bool(weight.mean((1, 2, 3)).abs().max() < 1e-6)
        True

    Source: S. Qiao et al. 2019 (arXiv 1903.10520) for weight standardisation; A. Brock, S. De and S. L. Smith 2021
    (arXiv 2101.08692), equation 5, for the scaled kind with a gain; De et al. 2022 (arXiv 2204.13650) use it with DP-SGD.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self.gain = nn.Parameter(torch.ones(out_channels))
        fan_in_normal_(self)

    def standardised_weight(self) -> Tensor:
        """The weight the convolution uses, of the shape of ``self.weight``."""
        return standardise(self.weight, self.gain)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Convolve ``(batch, in_channels, height, width)`` with the standardised weight."""
        weight = self.standardised_weight()
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def fan_in_normal_(convolution: nn.Conv2d) -> None:
    """Draw a convolution's weight from N(0, 1/fan_in) and set its bias to zero, in place."""
    nn.init.normal_(convolution.weight, std=1 / math.sqrt(convolution.weight[0].numel()))
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
