"""Augmentations of single images that a whole batch goes through at once, each row with random numbers of its own."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class ViewTransform(ABC):
    """A random change of an image, as a function of the image and of uniform random numbers.

    Row n of the result must depend on row n of the arguments alone.

    Attributes:
        draws: how many uniform numbers one view needs.
    """

    draws: int

    @abstractmethod
    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Change ``images`` ``(N, channels, height, width)``, row n by ``uniforms[n]``, ``(N, draws)`` in [0, 1)."""


class Compose(ViewTransform):
    """Several transforms, one after the other.

    Args:
        transforms: the first is applied first.
    """

    def __init__(self, transforms: Sequence[ViewTransform]) -> None:
        self.transforms = list(transforms)
        self.draws = sum(transform.draws for transform in self.transforms)

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Apply all transforms, each with its own share of the uniform numbers."""
        parts = torch.split(uniforms, [transform.draws for transform in self.transforms], dim=1)
        for transform, part in zip(self.transforms, parts, strict=True):
            images = transform(images, part)
        return images


class Crop(ViewTransform):
    """Pad an image by its own mirror image and cut a square out at random.

    The mirror repeats the pixels of the edge ("symmetric" in NumPy, as the paper does), or leaves them out ("reflect", as
    torchvision and PyTorch name it). All (height + 2·padding − size + 1) · (width + 2·padding − size + 1) places are equally
    likely.

    Args:
        size: edge of the square; ``None`` for the size of the image.
        padding: pixels added on every side.
        mirror: ``"symmetric"`` or ``"reflect"``.

    Raises:
        ValueError: a number is out of range, ``mirror`` is unknown, or the padded image is smaller than ``size``.

    Example:
        >>> Crop(padding=1)(torch.arange(4.0).view(1, 1, 2, 2), torch.zeros(1, 2))[0, 0]
        tensor([[0., 0.],
                [0., 0.]])

    Source: De et al. 2022 (arXiv 2204.13650) and their code.
    """

    draws = 2

    def __init__(
        self, size: int | None = None, padding: int = 4, mirror: Literal["symmetric", "reflect"] = "symmetric"
    ) -> None:
        if size is not None and size < 1:
            raise ValueError(f"size={size}: expected at least 1 pixel, or None for the size of the image.")
        if padding < 0:
            raise ValueError(f"padding={padding}: expected at least 0 pixels, such as 4.")
        if mirror not in ("symmetric", "reflect"):
            raise ValueError(f"mirror={mirror!r}: expected 'symmetric' or 'reflect'.")
        self.size, self.padding, self.mirror = size, padding, mirror

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Cut one square out of each image."""
        height, width = images.shape[-2:]
        rows = self._places(height, self.size or height, uniforms[:, 0])
        columns = self._places(width, self.size or width, uniforms[:, 1])
        n, channels = images.shape[:2]
        example = torch.arange(n, device=images.device).view(-1, 1, 1, 1)
        channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
        return images[example, channel, rows[:, None, :, None], columns[:, None, None, :]]

    def _places(self, length: int, size: int, uniform: Tensor) -> Tensor:
        """Which of ``length`` pixels each of ``size`` pixels of the square comes from, ``(N, size)``."""
        room = length + 2 * self.padding - size + 1
        if room < 1:
            raise ValueError(
                f"size={size}: expected at most {length + 2 * self.padding}, the image's {length} pixels and the padding. "
                "Give a smaller size or load larger images."
            )
        start = (uniform.double() * room).long().clamp(max=room - 1)
        place = start[:, None] + torch.arange(size, device=uniform.device) - self.padding
        period = 2 * length - 2 * (self.mirror == "reflect")  # of the image and its mirror image, one after the other
        place = place.remainder(max(period, 1))
        return torch.where(place < length, place, 2 * length - 1 - (self.mirror == "reflect") - place)


class Flip(ViewTransform):
    """Mirror an image left to right with a probability.

    Args:
        probability: of being mirrored, in [0, 1].

    Raises:
        ValueError: ``probability`` is outside [0, 1].
    """

    draws = 1

    def __init__(self, probability: float = 0.5) -> None:
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability}: expected a number in [0, 1], such as 0.5.")
        self.probability = probability

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Mirror the rows whose number is below the probability."""
        mirrored = (uniforms[:, 0] < self.probability).view(-1, 1, 1, 1)
        return torch.where(mirrored, images.flip(-1), images)


class ResizedCrop(ViewTransform):
    """Cut a rectangle of random area and shape out at a random place and stretch it to a square (bilinear).

    The area is uniform in ``scale`` (as a share of the image's), the logarithm of width/height uniform in ``ratio``'s; a
    side that would be longer than the image's is cut to it (torchvision draws again instead). Where the rectangle is
    larger than the square no low-pass filter is applied, so keep the images not much larger than twice ``size``.

    Args:
        size: edge of the square.
        scale: smallest and largest share of the area.
        ratio: smallest and largest width/height.

    Raises:
        ValueError: a number is out of range.

    Source: C. Szegedy et al. 2015, *Going deeper with convolutions*, section 6, for this way of training.
    """

    draws = 4

    def __init__(
        self, size: int, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: expected at least 1 pixel, such as 224.")
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError(f"scale={scale}: expected two ascending shares in (0, 1], such as (0.08, 1.0).")
        if not 0 < ratio[0] <= ratio[1]:
            raise ValueError(f"ratio={ratio}: expected two ascending numbers above 0, such as (0.75, 1.33).")
        self.size, self.scale, self.ratio = size, scale, ratio

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Cut and stretch one rectangle out of each image."""
        u = uniforms.to(images.dtype)
        area = self.scale[0] + u[:, 0] * (self.scale[1] - self.scale[0])
        shape = torch.exp(math.log(self.ratio[0]) + u[:, 1] * math.log(self.ratio[1] / self.ratio[0]))
        aspect = images.shape[-2] / images.shape[-1]
        across = (area * shape * aspect).sqrt().clamp(max=1)  # share of the width
        down = (area / shape / aspect).sqrt().clamp(max=1)
        zero = torch.zeros_like(across)
        matrix = torch.stack(
            [across, zero, (2 * u[:, 2] - 1) * (1 - across), zero, down, (2 * u[:, 3] - 1) * (1 - down)], dim=1
        ).view(-1, 2, 3)
        shape_out = (len(images), images.shape[1], self.size, self.size)
        grid = F.affine_grid(matrix, list(shape_out), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


class ColourJitter(ViewTransform):
    """Change brightness, contrast, saturation and hue at random, in this order.

    Factors are uniform in [1 − s, 1 + s] for a strength s; the hue turns by an angle uniform in ±(strength · 360°), as a
    rotation in the chrominance plane of YIQ. Images are taken back to [0, 1] with ``mean`` and ``std``, changed, clamped
    and normalised again.

    Args:
        brightness: strength, at least 0.
        contrast: strength, at least 0.
        saturation: strength, at least 0.
        hue: strength, in [0, 0.5].
        probability: of being changed at all, in [0, 1].
        mean: what the images were shifted by, per channel.
        std: what the images were divided by, per channel.

    Raises:
        ValueError: a strength or the probability is out of range.
    """

    draws = 4
    """One more where the probability is below 1."""

    def __init__(
        self,
        brightness: float = 0.15,
        contrast: float = 0.3,
        saturation: float = 0.4,
        hue: float = 0.1,
        mean: tuple[float, float, float] = (0.485, 0.456, 0.406),
        std: tuple[float, float, float] = (0.229, 0.224, 0.225),
        probability: float = 1.0,
    ) -> None:
        for name, value in (("brightness", brightness), ("contrast", contrast), ("saturation", saturation)):
            if value < 0:
                raise ValueError(f"{name}={value}: expected at least 0, such as 0.3.")
        if not 0 <= hue <= 0.5:
            raise ValueError(f"hue={hue}: expected a number in [0, 0.5], such as 0.1.")
        if not 0 <= probability <= 1:
            raise ValueError(f"probability={probability}: expected a number in [0, 1], such as 0.3.")
        self.probability = probability
        if probability < 1:
            self.draws = 5
        self.strengths = (brightness, contrast, saturation)
        self.hue, self.mean, self.std = hue, mean, std

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Change the colours of each image."""
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (self.mean, self.std))
        to_grey = images.new_tensor(LUMA).view(1, 3, 1, 1)
        u = (2 * uniforms[:, :4] - 1).to(images.dtype).view(-1, 4, 1, 1, 1)
        brightness, contrast, saturation = (
            (1 + strength * u[:, place]).clamp(min=0) for place, strength in enumerate(self.strengths)
        )
        x = ((images * std + mean) * brightness).clamp(0, 1)
        grey = (x * to_grey).sum(1, keepdim=True).mean((2, 3), keepdim=True)
        x = (grey + (x - grey) * contrast).clamp(0, 1)
        grey = (x * to_grey).sum(1, keepdim=True)
        x = (grey + (x - grey) * saturation).clamp(0, 1)
        angle = (2 * math.pi * self.hue) * u[:, 3].view(-1)
        x = torch.einsum("nij,njhw->nihw", _hue_rotation(angle), x).clamp(0, 1)
        changed = (x - mean) / std
        if self.probability == 1:
            return changed
        return torch.where((uniforms[:, 4] < self.probability).view(-1, 1, 1, 1), changed, images)


class EachImage(ViewTransform):
    """Any transform of one image, such as torchvision's, applied image by image.

    Torch's global generator is seeded from the image's own random number before each call and put back afterwards.
    (Given a whole batch, torchvision's transforms would treat all its images alike.) Slower than the transforms here.

    Args:
        transform: takes and returns ``(channels, height, width)``, and draws from torch's global generator alone.
    """

    draws = 1

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, images: Tensor, uniforms: Tensor) -> Tensor:
        """Transform the images one by one."""
        changed = []
        with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
            for image, uniform in zip(images, uniforms[:, 0].tolist(), strict=True):
                torch.manual_seed(int(uniform * 2**24))
                changed.append(self.transform(image))
        return torch.stack(changed)


LUMA = (0.299, 0.587, 0.114)
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def _hue_rotation(angle: Tensor) -> Tensor:
    """RGB → YIQ, turn I and Q by ``angle`` (N,), → RGB: ``(N, 3, 3)``."""
    forth = angle.new_tensor(_YIQ)
    turn = torch.zeros(len(angle), 3, 3, dtype=angle.dtype, device=angle.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1], turn[:, 1, 2] = angle.sin(), -angle.sin()
    rotation: Tensor = torch.linalg.inv(forth) @ turn @ forth
    return rotation
