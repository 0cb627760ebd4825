"""The kernel: squares of gradients of a convolution's kernel, tile by tile. The only file that imports Triton."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dp.engines.triton.window import Window
from lightning_dp.mechanism.clip import accumulation_dtype

AXES = 3
"""So many axes the kernel walks over; those that are missing have length one."""

BLOCK_P, BLOCK_N, BLOCK_T = 32, 64, 32
"""Output channels and numbers of the kernel in a tile, and positions at a time. Products want no less than 16."""


def tiles(x: Tensor, g: Tensor, window: Window) -> Tensor:
    """Of each tile of each example's gradient Σ_t g_t patch_tᵀ: what is known of it.

    Args:
        x: inputs, ``(B, own, C, *)``, in any layout.
        g: output gradients, ``(B, own, p, *)``, in the type of ``x``.
        window: of the convolution.

    Returns:
        ``(4, B, tiles)`` in the accumulation type: its norm; ‖patches‖ · ‖g‖ of the numbers that go into it; each of these two.
        Norms of all tiles are those of the whole, of the last two multiples of it that are no smaller.
    """
    missing = (1,) * (AXES - (x.ndim - 3))
    x, g = (t.reshape(*t.shape[:3], *missing, *t.shape[3:]) for t in (x, g))
    stride, dilation = (missing + one for one in (window.stride, window.dilation))
    kernel, padding = missing + window.kernel, (0,) * len(missing) + window.padding
    channels, of_group = x.shape[2] // window.groups, g.shape[2] // window.groups
    columns = channels * math.prod(kernel)
    high, wide = triton.cdiv(of_group, BLOCK_P), triton.cdiv(columns, BLOCK_N)
    count = window.groups * high * wide
    found = torch.empty(4, len(x), count, dtype=accumulation_dtype(g.dtype), device=g.device)
    with torch.cuda.device_of(g):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        _tile[(len(x) * count,)](
            x, g, found, len(x) * count, window.groups, high, wide, channels, of_group, x.shape[1], *x.shape[3:],
            *g.shape[3:], *kernel, *stride, *padding, *dilation, *x.stride(), *g.stride(),
            block_p=BLOCK_P, block_n=BLOCK_N, block_t=BLOCK_T, widens=triton.knobs.runtime.interpret,
        )  # fmt: skip
    return found


@triton.jit  # type: ignore[untyped-decorator]  # a language of its own
def _tile(  # type: ignore[no-untyped-def]  # likewise
    x, g, found, count, groups, high, wide, channels, of_group, own, depth, height, width,
    out_depth, out_height, out_width, kernel_depth, kernel_height, kernel_width,
    stride_depth, stride_height, stride_width, pad_depth, pad_height, pad_width,
    step_depth, step_height, step_width, x_b, x_o, x_c, x_d, x_h, x_w, g_b, g_o, g_c, g_d, g_h, g_w,
    block_p: tl.constexpr, block_n: tl.constexpr, block_t: tl.constexpr, widens: tl.constexpr,
):  # fmt: skip
    """One tile of one example: some output channels, some numbers of the kernel, all positions, some at a time."""
    program = tl.program_id(0)
    group = program // (wide * high) % groups
    example = (program // (wide * high * groups)).to(tl.int64)
    row = program // wide % high * block_p + tl.arange(0, block_p)
    column = program % wide * block_n + tl.arange(0, block_n)
    at_width = column % kernel_width
    at_height = column // kernel_width % kernel_height
    at_depth = column // (kernel_width * kernel_height) % kernel_depth
    channel = column // (kernel_width * kernel_height * kernel_depth)
    of_row = g + example * g_b + (group * of_group + row[:, None]).to(tl.int64) * g_c
    of_column = x + example * x_b + (group * channels + channel[None, :]).to(tl.int64) * x_c
    positions = own * out_depth * out_height * out_width
    total = tl.zeros((block_p, block_n), tl.float32)
    of_patches = tl.zeros((block_t, block_n), tl.float32)
    of_gradients = tl.zeros((block_p, block_t), tl.float32)
    for start in range(0, positions, block_t):
        position = start + tl.arange(0, block_t)
        out_w = position % out_width
        out_h = position // out_width % out_height
        out_d = position // (out_width * out_height) % out_depth
        sample = (position // (out_width * out_height * out_depth)).to(tl.int64)
        there = position < positions
        place = sample * g_o + out_d * g_d + out_h * g_h + out_w * g_w
        gradients = tl.load(of_row + place[None, :], (row[:, None] < of_group) & there[None, :], 0.0)
        d = out_d[:, None] * stride_depth - pad_depth + at_depth[None, :] * step_depth
        h = out_h[:, None] * stride_height - pad_height + at_height[None, :] * step_height
        w = out_w[:, None] * stride_width - pad_width + at_width[None, :] * step_width
        inside = (d >= 0) & (d < depth) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        inside = inside & there[:, None] & (channel[None, :] < channels)
        patches = tl.load(of_column + sample[:, None] * x_o + d * x_d + h * x_h + w * x_w, inside, 0.0)
        wide_gradients, wide_patches = gradients.to(tl.float32), patches.to(tl.float32)
        if widens:  # Triton's interpreter multiplies the bits of bfloat16
            total = tl.dot(wide_gradients, wide_patches, total, input_precision="ieee")
        else:
            total = tl.dot(gradients, patches, total, input_precision="ieee")
        of_gradients += wide_gradients * wide_gradients
        of_patches += wide_patches * wide_patches
    size_of_patches = tl.sqrt(tl.sum(tl.sum(of_patches, 1), 0))
    size_of_gradients = tl.sqrt(tl.sum(tl.sum(of_gradients, 1), 0))
    place_of_tile = found + program
    tl.store(place_of_tile, tl.sqrt(tl.sum(tl.sum(total * total, 1), 0)))
    tl.store(place_of_tile + count, size_of_patches * size_of_gradients)
    tl.store(place_of_tile + 2 * count, size_of_patches)
    tl.store(place_of_tile + 3 * count, size_of_gradients)
