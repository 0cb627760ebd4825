"""A small convolutional network for 32x32 pixels that a CPU trains and that features can be learned with beforehand."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override


class StridedCNN(nn.Module):
    """Four 3x3 convolutions with group norm and ReLU, three of them with stride 2, the mean of each quarter, a linear layer.

    Channels are width, 2·width, 4·width and 4·width; the linear layer sees 4 · 4·width features.

    Args:
        width: channels of the first convolution, a multiple of 8.
        num_classes: the number of classes.
        in_channels: channels of the images.
        feature_groups: groups of a norm without parameters on the features, each image by itself, so that clipping scales all
            images alike; it must divide 16·width. 0 leaves it out.

    Raises:
        ValueError: ``width`` is no multiple of 8, or ``feature_groups`` does not divide the features.

    Example:
        >>> import torch
        >>> network = StridedCNN()
        >>> network(torch.zeros(3, 3, 32, 32)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([3, 10]), 246410)
    """

    def __init__(self, width: int = 32, num_classes: int = 10, in_channels: int = 3, feature_groups: int = 0) -> None:
        super().__init__()
        if width < 8 or width % 8:
            raise ValueError(f"width={width}: expected a multiple of 8, such as 32.")
        if feature_groups < 0 or (feature_groups and 16 * width % feature_groups):
            raise ValueError(
                f"feature_groups={feature_groups}: expected a divisor of {16 * width}, such as 16, or 0 for no norm."
            )
        channels = [in_channels, width, 2 * width, 4 * width, 4 * width]
        self.body = nn.Sequential(
            *[
                nn.Sequential(nn.Conv2d(before, after, 3, stride, padding=1), nn.GroupNorm(8, after), nn.ReLU())
                for before, after, stride in zip(channels, channels[1:], (2, 2, 1, 2), strict=False)
            ]
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.norm = nn.GroupNorm(feature_groups, 16 * width, affine=False) if feature_groups else nn.Identity()
        self.classifier = nn.Linear(16 * width, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, in_channels, height, width)`` to logits ``(batch, num_classes)``."""
        logits: Tensor = self.classifier(self.norm(self.pool(self.body(images)).flatten(1)))
        return logits
