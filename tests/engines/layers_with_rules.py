"""Layers of every kind that has a rule, and modules that call every function that has one, each with inputs.

A rule that is not listed here fails in ``test_rules.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = tuple[Callable[[], nn.Module], Callable[[int], Tensor]]
"""Makes the layer, and inputs for so many examples."""


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda examples: torch.randn(examples, *shape, dtype=torch.float64)


def tokens(length: int, words: int) -> Callable[[int], Tensor]:
    return lambda examples: torch.randint(words, (examples, length))


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x, x, need_weights=False)[0]


class Calling(nn.Module):
    """A layer of one's own that calls a function with its weight and bias."""

    def __init__(self, call: Callable[..., Tensor], weight: tuple[int, ...], bias: int = 0) -> None:
        super().__init__()
        self.call, self.weight = call, nn.Parameter(torch.ones(weight))
        self.bias = nn.Parameter(torch.ones(bias)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x, self.weight, self.bias)


LAYERS_OF: dict[type[nn.Module], list[Layer]] = {
    nn.Linear: [
        (lambda: nn.Linear(5, 3), numbers(5)),
        (lambda: nn.Linear(5, 3, bias=False), numbers(2, 7, 5)),
    ],
    nn.Conv1d: [(lambda: nn.Conv1d(2, 4, 3, stride=2, padding=1, dilation=2), numbers(2, 9))],
    nn.Conv2d: [
        (lambda: nn.Conv2d(2, 4, 3, padding="same", padding_mode="circular"), numbers(2, 5, 6)),
        (lambda: nn.Conv2d(4, 6, (3, 2), groups=2, bias=False), numbers(4, 5, 6)),
    ],
    nn.Conv3d: [(lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), numbers(2, 3, 4, 3))],
    nn.Embedding: [
        (lambda: nn.Embedding(7, 3), tokens(4, 7)),
        (lambda: nn.Embedding(40, 6, padding_idx=2, sparse=True), tokens(3, 40)),
    ],
    nn.LayerNorm: [
        (lambda: nn.LayerNorm(6), numbers(3, 6)),
        (lambda: nn.LayerNorm((3, 6), eps=0.1, bias=False), numbers(3, 6)),
    ],
    nn.RMSNorm: [(lambda: nn.RMSNorm(6), numbers(3, 6)), (lambda: nn.RMSNorm((3, 6), eps=0.1), numbers(2, 3, 6))],
    nn.GroupNorm: [
        (lambda: nn.GroupNorm(2, 6), numbers(6, 4)),
        (lambda: nn.GroupNorm(3, 6, eps=0.1), numbers(6, 4, 3)),
    ],
    nn.InstanceNorm1d: [(lambda: nn.InstanceNorm1d(3, affine=True), numbers(3, 5))],
    nn.InstanceNorm2d: [(lambda: nn.InstanceNorm2d(3, affine=True), numbers(3, 5, 2))],
    nn.InstanceNorm3d: [(lambda: nn.InstanceNorm3d(2, affine=True), numbers(2, 2, 3, 2))],
    nn.MultiheadAttention: [
        (SelfAttention, numbers(4, 6)),
        (lambda: SelfAttention(bias=False), numbers(4, 6)),
    ],
}

CALLERS_OF: dict[Callable[..., Any], list[Layer]] = {
    F.linear: [(lambda: Calling(F.linear, (3, 5), 3), numbers(2, 5))],
    torch.mm: [(lambda: Calling(lambda x, w, b: torch.mm(x.flatten(0, -2), w), (5, 3)), numbers(2, 5))],
    torch.matmul: [(lambda: Calling(lambda x, w, b: torch.matmul(x, w), (5, 3)), numbers(2, 5))],
    Tensor.matmul: [(lambda: Calling(lambda x, w, b: x.matmul(w), (5, 3)), numbers(2, 5))],
    Tensor.__matmul__: [(lambda: Calling(lambda x, w, b: x @ w, (5, 3)), numbers(2, 5))],
    torch.addmm: [(lambda: Calling(lambda x, w, b: torch.addmm(b, x.flatten(0, -2), w), (5, 3), 3), numbers(2, 5))],
    F.conv1d: [(lambda: Calling(F.conv1d, (4, 2, 3), 4), numbers(2, 6))],
    F.conv2d: [(lambda: Calling(F.conv2d, (4, 2, 3, 2), 4), numbers(2, 5, 4))],
    F.conv3d: [(lambda: Calling(F.conv3d, (3, 2, 2, 1, 2), 3), numbers(2, 3, 2, 4))],
    F.group_norm: [(lambda: Calling(lambda x, w, b: F.group_norm(x, 2, w, b), (6,), 6), numbers(6, 4))],
    F.layer_norm: [(lambda: Calling(lambda x, w, b: F.layer_norm(x, (6,), w, b), (6,), 6), numbers(3, 6))],
}
