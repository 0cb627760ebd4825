"""A small convolutional network with tanh, for private training on a CPU."""

from __future__ import annotations

from torch import Tensor, nn
from typing_extensions import override


class TanhCNN(nn.Module):
    """Group norm without parameters, two 3x3 convolutions with tanh, max pooling between them, and a linear layer.

    tanh bounds what a layer passes on, and so the gradients, whose clipping then takes less away than it does with ReLU.
    The group norm puts channels of different sizes, as features of images have, on one scale, for each example by itself.

    Args:
        size: edge of the input, even.
        in_channels: channels of the input.
        width: channels of both convolutions.
        groups: groups of the norm; they must divide ``in_channels``. 0 leaves the norm out.
        num_classes: the number of classes.

    Raises:
        ValueError: ``size`` is odd, or ``groups`` does not divide ``in_channels``.

    Example:
        >>> import torch
        >>> network = TanhCNN()
        >>> network(torch.zeros(3, 243, 8, 8)).shape, sum(p.numel() for p in network.parameters())
        (torch.Size([3, 10]), 187210)

    Source: N. Papernot, A. Thakurta, S. Song, S. Chien and Ú. Erlingsson, *Tempered Sigmoid Activations for Deep Learning
    with Differential Privacy*, AAAI 2021 (arXiv 2007.14191), for tanh; F. Tramèr and D. Boneh, ICLR 2021
    (arXiv 2011.11660), for a small network on group-normed scattering features.
    """

    def __init__(
        self, size: int = 8, in_channels: int = 243, width: int = 64, groups: int = 27, num_classes: int = 10
    ) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise ValueError(f"size={size}: expected an even number. Resize or pad the input.")
        if groups < 0 or (groups and in_channels % groups):
            raise ValueError(
                f"groups={groups} with in_channels={in_channels}: expected a divisor of in_channels, or 0 for no norm."
            )
        self.norm = nn.GroupNorm(groups, in_channels, affine=False) if groups else nn.Identity()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.classifier = nn.Linear(width * (size // 2) ** 2, num_classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map ``(batch, in_channels, size, size)`` to logits ``(batch, num_classes)``."""
        hidden = self.pool(self.first(self.norm(images)).tanh())
        logits: Tensor = self.classifier(self.second(hidden).tanh().flatten(1))
        return logits
