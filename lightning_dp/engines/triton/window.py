"""Where the kernels are offered, and what they are told of a convolution."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

TYPES = (torch.float32, torch.bfloat16)
"""Of gradients."""


@dataclass(frozen=True)
class Window:
    """What the outputs of a convolution over at most three axes see of its input.

    Attributes:
        kernel: numbers along each axis.
        stride: per axis.
        padding: per axis.
        dilation: per axis.
        groups: of channels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


PIXEL = Window((1,), (1,), (0,), (1,), 1)
"""A linear layer over positions is a convolution of that many samples of one pixel, with a kernel of one."""


def offered(g: Tensor) -> bool:
    """Whether there are kernels for output gradients such as these: on CUDA, where Triton can be imported."""
    return g.device.type == "cuda" and g.dtype in TYPES and _can_be_imported()


@cache
def _can_be_imported() -> bool:
    return importlib.util.find_spec("triton") is not None
