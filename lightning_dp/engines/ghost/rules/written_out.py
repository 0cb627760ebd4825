"""Ways to write out the gradients of a convolution's kernel, one of each example. All give the same, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers

PLANE = 2
"""So many axes at most are those that torch makes patches of."""

AT_ONCE = {"cpu": 2**21}
"""So many numbers of patches lie in memory at once, on a CPU no more than its cache holds."""

AT_ONCE_ELSEWHERE = 2**26


class Convolving(Protocol):
    """What is asked of the convolution."""

    @property
    def stride(self) -> tuple[int, ...]:
        """Per axis."""
        ...

    @property
    def padding(self) -> tuple[int, ...]:
        """Per axis."""
        ...

    @property
    def dilation(self) -> tuple[int, ...]:
        """Per axis."""
        ...

    @property
    def groups(self) -> int:
        """Of channels."""
        ...

    def weight_gradient(self, x: Tensor, g: Tensor, weight: Tensor, groups: int) -> Tensor:
        """The plain gradient of a batch."""
        ...


Form = Callable[[Convolving, Tensor, Tensor, Tensor, Buffers], Tensor]
"""Convolution, inputs ``(B, own, C, *)``, output gradients ``(B, own, p, *)``, kernel, memory → ``(B, *kernel)``."""


def slices(of: Convolving, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
    """The kernel of the plain backward pass on one example after the other, straight into one buffer."""
    rows = buffers.take((len(x), *weight.shape), like=x)
    for row, one_x, one_g in zip(rows, x, g, strict=True):
        row.copy_(of.weight_gradient(one_x, one_g, weight, of.groups))
    return rows


def groups(of: Convolving, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
    """All examples in one call, each as a group of channels of its own."""
    x, g = (t.transpose(0, 1).flatten(1, 2) for t in (x, g))
    examples = g.shape[1] // len(weight)
    repeated = weight.expand(examples, *weight.shape).flatten(0, 1)
    return of.weight_gradient(x, g, repeated, examples * of.groups).view(examples, *weight.shape)


def patches(of: Convolving, x: Tensor, g: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
    """Σ_t g_t patch_tᵀ over the positions t, by one product of matrices an example."""
    rows = buffers.take((len(x), *weight.shape), like=x)
    each = g[0, :, 0].numel() * weight[0].numel() * of.groups
    most = max(1, AT_ONCE.get(x.device.type, AT_ONCE_ELSEWHERE) // max(each, 1))
    for some, some_x, some_g in zip(*(torch.split(t, most) for t in (rows, x, g)), strict=True):
        count = len(some) * of.groups
        cut = _cut(of, some_x.flatten(0, 1), weight).view(*some_x.shape[:2], of.groups, weight[0].numel(), -1)
        given = some_g.flatten(3).unflatten(2, (of.groups, -1))
        left, right = (t.movedim(1, 3).flatten(3).flatten(0, 1) for t in (given, cut))
        torch.bmm(left, right.transpose(1, 2), out=some.view(count, -1, weight[0].numel()))
    return rows


def _cut(of: Convolving, x: Tensor, weight: Tensor) -> Tensor:
    """The patches that the kernel meets, ``(B · own, C · numbers of the kernel, T)``."""
    missing = PLANE - len(of.stride)  # a line is a plane of height one
    size, dilation, padding, stride = (
        (*(usual,) * missing, *given)
        for usual, given in ((1, weight.shape[2:]), (1, of.dilation), (0, of.padding), (1, of.stride))
    )
    return F.unfold(x.view(*x.shape[:2], *(1,) * missing, *x.shape[2:]), size, dilation, padding, stride)


FORMS: dict[str, Form] = {"slices": slices, "groups": groups, "patches": patches}
"""Name → form. On a CPU the first is estimated to be the fastest, elsewhere the second."""
