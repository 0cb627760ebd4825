"""The published formulas of the paper's networks, written down once more: no module, no padding argument, no timm.

Everything is a function of arrays named as the authors name them. Convolutions see an image that was padded by hand, weights
are standardised by the definition of mean and variance, pooling is a maximum over shifted copies. In float64 the networks of
the package have to give these numbers to 1e-10.

Sources: De, Berrada, Hayes, Smith and Balle 2022 (arXiv 2204.13650) for the wide ResNet; A. Brock, S. De and S. L. Smith 2021
(arXiv 2101.08692) and A. Brock, S. De, S. L. Smith and K. Simonyan 2021 (arXiv 2102.06171) for the norm-free networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

Arrays = Mapping[str, Tensor]
RELU, GELU = 1.7139588594436646, 1.7015043497085571
"""1 / the standard deviation of ReLU, and of GELU, of a standard normal number, as the authors estimated them."""


def same(images: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """TensorFlow's definition: ceil(n / stride) windows, the padding halved, the larger half after the image."""
    for axis in (2, 3):
        size = images.shape[axis]
        missing = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        shape = list(images.shape)
        ends = []
        for amount in (missing // 2, missing - missing // 2):
            shape[axis] = amount
            ends.append(images.new_full(shape, value))
        images = torch.cat([ends[0], images, ends[1]], dim=axis)
    return images


def standardised(weight: Tensor, gain: Tensor) -> Tensor:
    rows = weight.reshape(len(weight), -1)
    fan_in = rows.shape[1]
    mean = rows.sum(1) / fan_in
    variance = ((rows - mean[:, None]) ** 2).sum(1) / fan_in
    scale = gain.reshape(-1) / torch.maximum(variance * fan_in, torch.full_like(variance, 1e-4)).sqrt()
    return ((rows - mean[:, None]) * scale[:, None]).reshape(weight.shape)


def convolution(arrays: Arrays, name: str, images: Tensor, stride: int = 1, groups: int = 1) -> Tensor:
    weight = standardised(arrays[f"{name}.weight"], arrays[f"{name}.gain"])
    padded = same(images, weight.shape[2], stride)
    return F.conv2d(padded, weight, None, stride, groups=groups) + arrays[f"{name}.bias"].view(1, -1, 1, 1)


def group_norm(arrays: Arrays, name: str, images: Tensor, groups: int = 16) -> Tensor:
    n, channels, height, width = images.shape
    parts = images.reshape(n, groups, -1)
    mean = parts.mean(2, keepdim=True)
    variance = ((parts - mean) ** 2).mean(2, keepdim=True)
    normed = ((parts - mean) / (variance + 1e-5).sqrt()).reshape(n, channels, height, width)
    return normed * arrays[f"{name}.weight"].view(1, -1, 1, 1) + arrays[f"{name}.bias"].view(1, -1, 1, 1)


def linear(arrays: Arrays, name: str, features: Tensor) -> Tensor:
    return torch.einsum("ni,oi->no", features, arrays[f"{name}.weight"]) + arrays[f"{name}.bias"]


def positive(images: Tensor) -> Tensor:
    return torch.maximum(images, torch.zeros_like(images))


def gelu(images: Tensor) -> Tensor:
    inner = math.sqrt(2 / math.pi) * (images + 0.044715 * images**3)
    return GELU * 0.5 * images * (1 + torch.tanh(inner))


def wide_resnet(arrays: Arrays, images: Tensor, depth: int) -> Tensor:
    """Names: of ``docs/models.md``, ``Block_<g>Conv_<i>_<j>`` and so on."""
    x = convolution(arrays, "First_conv", images)
    for g in (1, 2, 3):
        for i in range((depth - 4) // 6):
            stride = 2 if g > 1 and i == 0 else 1
            shortcut = x
            if i == 0:
                normed = group_norm(arrays, f"Block_{g}_skip_norm", positive(x))
                shortcut = convolution(arrays, f"Block_{g}_skip_conv", normed, stride)
            for j in (0, 1):
                normed = group_norm(arrays, f"Block_{g}_norm_{i}_{j}", positive(x))
                x = convolution(arrays, f"Block_{g}Conv_{i}_{j}", normed, stride if j == 0 else 1)
            x = x + shortcut
    return linear(arrays, "Softmax", group_norm(arrays, "Final_norm", positive(x)).mean((2, 3)))


def nf_resnet(arrays: Arrays, images: Tensor, blocks: tuple[int, ...]) -> Tensor:
    """Names: of timm. α = 0.2, β = 1 / the expected standard deviation, which begins anew with each stage."""
    act = lambda x: RELU * positive(x)  # noqa: E731  # a formula
    x = convolution(arrays, "stem.conv", images, 2)
    padded = same(x, 3, 2, -math.inf)
    height, width = ((size - 3) // 2 + 1 for size in padded.shape[2:])
    shifted = [padded[:, :, a : a + 2 * height : 2, b : b + 2 * width : 2] for a in range(3) for b in range(3)]
    x = torch.stack([copy[:, :, :height, :width] for copy in shifted]).amax(0)
    expected = 1.0
    for stage, count in enumerate(blocks):
        for i in range(count):
            name, stride = f"stages.{stage}.{i}", 2 if stage and i == 0 else 1
            out = act(x) / math.sqrt(expected)
            shortcut = convolution(arrays, f"{name}.downsample.conv", out, stride) if i == 0 else x
            out = convolution(arrays, f"{name}.conv1", out)
            out = convolution(arrays, f"{name}.conv2", act(out), stride)
            out = convolution(arrays, f"{name}.conv3", act(out))
            x = shortcut + 0.2 * arrays[f"{name}.skipinit_gain"] * out
            expected = (1.0 if i == 0 else expected) + 0.2**2
    return linear(arrays, "head.fc", act(x).mean((2, 3)))


def nfnet(arrays: Arrays, images: Tensor, blocks: tuple[int, ...], group_size: int = 128) -> Tensor:
    """Names: of timm. The F-series: four stem convolutions, two grouped 3x3 in a block, squeeze and excite times 2."""
    x = images
    for number, stride in enumerate((2, 1, 1, 2), 1):
        x = convolution(arrays, f"stem.conv{number}", gelu(x) if number > 1 else x, stride)
    expected = 1.0
    for stage, count in enumerate(blocks):
        for i in range(count):
            name, stride = f"stages.{stage}.{i}", 2 if stage and i == 0 else 1
            out = gelu(x) / math.sqrt(expected)
            shortcut = convolution(arrays, f"{name}.downsample.conv", averaged(out, stride)) if i == 0 else x
            out = convolution(arrays, f"{name}.conv1", out)
            groups = out.shape[1] // group_size
            out = convolution(arrays, f"{name}.conv2", gelu(out), stride, groups)
            out = convolution(arrays, f"{name}.conv2b", gelu(out), 1, groups)
            out = convolution(arrays, f"{name}.conv3", gelu(out))
            squeezed = out.mean((2, 3))
            for layer, wrap in (("fc1", positive), ("fc2", torch.sigmoid)):
                weight, bias = (arrays[f"{name}.attn_last.{layer}.{kind}"] for kind in ("weight", "bias"))
                squeezed = wrap(torch.einsum("ni,oi->no", squeezed, weight.flatten(1)) + bias)
            out = 2 * squeezed[:, :, None, None] * out
            x = shortcut + 0.2 * arrays[f"{name}.skipinit_gain"] * out
            expected = (1.0 if i == 0 else expected) + 0.2**2
    x = convolution(arrays, "final_conv", x)
    return linear(arrays, "head.fc", gelu(x).mean((2, 3)))


def averaged(images: Tensor, stride: int) -> Tensor:
    """The mean of those pixels of each 2x2 window that are inside the image."""
    if stride == 1:
        return images
    total, count = (same(x, 2, 2) for x in (images, torch.ones_like(images)))
    parts = [
        (x[:, :, 0::2, 0::2] + x[:, :, 1::2, 0::2] + x[:, :, 0::2, 1::2] + x[:, :, 1::2, 1::2]) for x in (total, count)
    ]
    return parts[0] / parts[1]
