"""Layers of the norm-free networks as their authors wrote them, put into timm's networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.layers.standardised_weights import standardise
from lightning_dp.models.same_padding import PadSame


class ScaledReLU(nn.Module):
    """ReLU times a constant, so that the output for standard normal input has unit variance.

    Source: A. Brock, S. De and S. L. Smith 2021 (arXiv 2101.08692), whose γ is sqrt(2 / (1 − 1/π)) = 1.7129; the
    constant is the one in the authors' code, which was estimated from samples.
    """

    gamma = 1.7139588594436646

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.gamma * torch.relu(features)


class ScaledGELU(nn.Module):
    """GELU in its tanh form, times a constant, so that the output for standard normal input has unit variance.

    Source: A. Brock, S. De, S. L. Smith and K. Simonyan 2021 (arXiv 2102.06171) and their code, which uses JAX's GELU.
    """

    gamma = 1.7015043497085571

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.gamma * F.gelu(features, approximate="tanh")


class ScaledWSConv2d(nn.Conv2d):
    """A convolution of timm with scaled weight standardisation, whose weights are divided as the authors divide them.

    timm adds 1e-5 to the variance; the authors bound variance · fan_in from below by 1e-4, so that a weight's size makes no
    difference above that bound. Names and shapes of the parameters are timm's.

    Args:
        convolution: whose parameters, stride and padding are taken over.
    """

    gain: nn.Parameter

    def __init__(self, convolution: nn.Conv2d) -> None:
        like: Any = convolution
        shape = (
            like.in_channels,
            like.out_channels,
            like.kernel_size,
            like.stride,
            like.padding,
            like.dilation,
            like.groups,
        )
        super().__init__(*shape, device="meta")  # its own parameters are thrown away
        self.weight, self.bias = like.weight, like.bias
        self.gain = convolution.get_parameter("gain")
        same: bool = getattr(convolution, "same_pad", False)
        self.pad = PadSame(convolution.kernel_size[0], convolution.stride[0]) if same else nn.Identity()

    @override
    def forward(self, images: Tensor) -> Tensor:
        weight = standardise(self.weight, self.gain)
        images = self.pad(images)
        return F.conv2d(images, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def follow_the_authors(network: nn.Module, stochastic_depth: float, *, strided_shortcuts: bool) -> None:
    """Change a norm-free network of timm, in place, to the one of the authors' code.

    Args:
        network: of timm, with activations that are scaled where they are computed.
        stochastic_depth: block i of n drops its branch with this · i / n, i from 0.
        strided_shortcuts: shortcuts step over the image with their convolution instead of averaging before it.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            new = _of_the_authors(child)
            if new is not None:
                setattr(module, name, new)
    blocks: list[Any] = [block for block in network.modules() if hasattr(block, "skipinit_gain")]
    for place, block in enumerate(blocks):
        if hasattr(block.drop_path, "drop_prob"):
            block.drop_path.drop_prob = stochastic_depth * place / len(blocks)
        if strided_shortcuts and block.downsample is not None:
            _convolve_with_stride(block.downsample)


def _of_the_authors(layer: nn.Module) -> nn.Module | None:
    """What takes the place of a layer of timm, if anything does."""
    gamma = getattr(layer, "gamma", None)
    if gamma is not None and hasattr(layer, "act_fn"):  # timm's overwrites what the gradient of ReLU needs
        kinds = [kind for kind in (ScaledReLU, ScaledGELU) if kind.gamma == gamma]
        return kinds[0]() if kinds else None
    if isinstance(layer, nn.Conv2d) and isinstance(getattr(layer, "gain", None), nn.Parameter):
        return ScaledWSConv2d(layer)
    if isinstance(layer, nn.MaxPool2d):
        return nn.Sequential(PadSame(3, 2, -torch.inf), nn.MaxPool2d(3, 2))
    return None


def _convolve_with_stride(shortcut: Any) -> None:
    """Let a shortcut's 1x1 convolution step over the image instead of pooling before it."""
    if isinstance(shortcut.pool, nn.AvgPool2d):
        stride = shortcut.pool.stride
        shortcut.conv.stride = (stride, stride) if isinstance(stride, int) else tuple(stride)
        shortcut.pool = nn.Identity()
