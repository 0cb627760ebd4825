"""SAME padding, as TensorFlow, Haiku and Flax have it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class PadSame(nn.Module):
    """A constant around images, so that a window that steps over them gives ⌈size / stride⌉ places in each direction.

    max((⌈size / stride⌉ − 1) · stride + kernel − size, 0) rows and columns are added, and where that is an odd number the one
    left over comes *after* the image. At stride 2 and a kernel of 3 an image of even size gets nothing before and one after,
    where ``padding=1`` of PyTorch gives one on either side: windows are then centred one pixel further up and left.

    Args:
        kernel: edge of the window.
        stride: its step.
        value: of the added pixels: 0 before a convolution, −∞ before a maximum.

    Example:
        >>> import torch
        >>> PadSame(3, 2)(torch.ones(1, 1, 4, 5))[0, 0].int()
        tensor([[0, 1, 1, 1, 1, 1, 0],
                [0, 1, 1, 1, 1, 1, 0],
                [0, 1, 1, 1, 1, 1, 0],
                [0, 1, 1, 1, 1, 1, 0],
                [0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    """

    def __init__(self, kernel: int, stride: int, value: float = 0.0) -> None:
        super().__init__()
        self.kernel, self.stride, self.value = kernel, stride, value

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Pad ``(..., height, width)``."""
        rows, columns = (self._missing(size) for size in images.shape[-2:])
        if not rows and not columns:
            return images
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        return F.pad(images, sides, value=self.value)

    def _missing(self, size: int) -> int:
        places = -(-size // self.stride)
        return max((places - 1) * self.stride + self.kernel - size, 0)
