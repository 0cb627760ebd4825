"""Wide residual networks as De et al. (2022) trained them with differential privacy."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal, get_args

from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.models.same_padding import PadSame
from lightning_dp.models.weight_standardisation import WSConv2d, fan_in_normal_

Order = Literal["relu_norm", "norm_relu"]
Norm = Literal["group", "none"]


class WideResNet(nn.Module):
    """WRN-depth-width for small colour images: a 3x3 convolution, three groups of residual blocks, a linear layer.

    Everywhere the order is ReLU → GroupNorm → weight-standardised convolution, which healthy signal propagation under
    DP-SGD needs; group g has ``(depth - 4) / 6`` blocks of ``16 · 2^g · width`` channels, and groups 1 and 2 halve the
    image. The first block of *every* group has a 1x1 convolution with a ReLU and a norm of its own as its shortcut, the
    other blocks pass their input on. The first convolution has no norm. At the end: ReLU → GroupNorm → mean over places
    → linear.

    Parameters: WRN-16-4 with 10 classes 2,753,818; WRN-40-4 8,961,306; WRN-28-10 36,500,378, with 100 classes
    36,558,068.

    Args:
        depth: number of layers, 6 n + 4.
        width: factor on the channels of the narrow network.
        num_classes: outputs of the linear layer.
        in_channels: channels of the images.
        groups: groups of each group norm; they must divide all channel numbers it sees.
        norm: ``"group"``, or ``"none"`` for an ablation. Batch norm mixes the examples of a batch and is refused.
        weight_standardisation: ``False`` for plain convolutions with bias, for an ablation.
        order: ``"norm_relu"`` is the classic order of pre-activation networks, for an ablation.
        same_padding: pad stride-2 convolutions as TensorFlow's and Haiku's SAME does, images of even size with nothing before
            and one row and column of zeros after, instead of one on either side. It is another network: the paper's recipes
            set it, and weights trained with those libraries need it.

    Raises:
        ValueError: depth is not 6 n + 4, groups do not divide the channels, or norm or order is unknown.

    Example:
        >>> import torch
        >>> WideResNet(depth=10, width=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Source: S. Zagoruyko and N. Komodakis 2016 (arXiv 1605.07146) for the network; De, Berrada, Hayes, Smith and Balle
    2022 (arXiv 2204.13650) and their code for this form of it. The weights they released are loaded as any public
    weights, see ``docs/models.md``.
    """

    def __init__(
        self,
        depth: int = 16,
        width: int = 4,
        num_classes: int = 10,
        in_channels: int = 3,
        groups: int = 16,
        norm: Norm = "group",
        weight_standardisation: bool = True,
        order: Order = "relu_norm",
        same_padding: bool = False,
    ) -> None:
        super().__init__()
        self.same_padding = same_padding
        _check(depth, width, groups, norm, order)
        blocks = (depth - 4) // 6
        options = _Options(groups, norm, weight_standardisation, order, same_padding)
        channels = [16, 16 * width, 32 * width, 64 * width]
        self.first_conv = options.convolution(in_channels, channels[0], 3)
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    ResidualBlock(
                        before if block == 0 else after, after, stride=2 if stage and block == 0 else 1,
                        projection=block == 0, options=options,
                    )
                    for block in range(blocks)
                ]
            )
            for stage, (before, after) in enumerate(pairwise(channels))
        )  # fmt: skip
        self.final = options.activation(channels[-1])
        self.classifier = nn.Linear(channels[-1], num_classes)
        spread = 1 / math.sqrt(channels[-1]) / TRUNCATED_STD
        nn.init.trunc_normal_(self.classifier.weight, std=spread, a=-2 * spread, b=2 * spread)
        nn.init.zeros_(self.classifier.bias)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        features = self.first_conv(images)
        for stage in self.stages:
            features = stage(features)
        logits: Tensor = self.classifier(self.final(features).mean((2, 3)))
        return logits


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after its own ReLU and norm, beside a shortcut.

    Args:
        before: channels of the input.
        after: channels of the output.
        stride: step of the first convolution and of the shortcut's.
        projection: whether the shortcut is a 1x1 convolution (with ReLU and norm) rather than the identity.
        options: how convolutions and activations are made.
    """

    def __init__(self, before: int, after: int, *, stride: int, projection: bool, options: _Options) -> None:
        super().__init__()
        self.shortcut: nn.Module = nn.Identity()
        if projection:
            self.shortcut = nn.Sequential(options.activation(before), options.convolution(before, after, 1, stride))
        self.residual = nn.Sequential(
            options.activation(before),
            options.convolution(before, after, 3, stride),
            options.activation(after),
            options.convolution(after, after, 3),
        )

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Return shortcut plus residual branch."""
        total: Tensor = self.shortcut(features) + self.residual(features)
        return total


class _Options:
    """How the layers of one network are made."""

    def __init__(self, groups: int, norm: Norm, weight_standardisation: bool, order: Order, same_padding: bool) -> None:
        self.groups, self.norm, self.order = groups, norm, order
        self.weight_standardisation, self.same_padding = weight_standardisation, same_padding

    def activation(self, channels: int) -> nn.Module:
        norm = nn.GroupNorm(self.groups, channels, eps=1e-5) if self.norm == "group" else nn.Identity()
        return nn.Sequential(nn.ReLU(), norm) if self.order == "relu_norm" else nn.Sequential(norm, nn.ReLU())

    def convolution(self, before: int, after: int, kernel: int, stride: int = 1) -> nn.Module:
        padded = self.same_padding and kernel > 1 and stride > 1
        make = WSConv2d if self.weight_standardisation else nn.Conv2d
        layer = make(before, after, kernel, stride, padding=0 if padded else kernel // 2)
        fan_in_normal_(layer)
        return nn.Sequential(PadSame(kernel, stride), layer) if padded else layer


TRUNCATED_STD = 0.87962566103423978
"""Standard deviation of a standard normal number truncated to [-2, 2]."""


def _check(depth: int, width: int, groups: int, norm: str, order: str) -> None:
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"depth={depth}: expected 6 n + 4 with n of at least 1, such as 16, 28 or 40.")
    if width < 1:
        raise ValueError(f"width={width}: expected at least 1, such as 4.")
    if norm not in get_args(Norm):
        because = (
            ""
            if "batch" not in norm.lower()
            else " Batch norm mixes the examples of a batch, so clipping bounds nothing."
        )
        raise ValueError(f"norm={norm!r}: expected one of {', '.join(get_args(Norm))}.{because}")
    if order not in get_args(Order):
        raise ValueError(f"order={order!r}: expected one of {', '.join(get_args(Order))}.")
    if norm == "group" and (groups < 1 or 16 % groups):
        raise ValueError(
            f"groups={groups}: expected a divisor of 16, the channels of the first convolution, such as 16 or 8."
        )
