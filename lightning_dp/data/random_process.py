"""Images drawn from a random process: nobody's data, to learn features from before private training begins."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import trange
from typing_extensions import override

from lightning_dp.data.images import ImageArray, ImageDataModule, Triple

CHUNK = 500
"""Images that are drawn at once, from a generator of their own: the first n of N images do not depend on N."""


class RandomProcessImages(ImageDataModule):
    """Dead leaves: textured shapes that fall on one another, each image from numbers of its own; its label is its position.

    A leaf is an ellipse, a rectangle or something between them, turned and stretched at random, its size drawn so that small
    ones are frequent; it and the ground have a colour and a texture, noise whose spectrum falls as a power of the frequency and
    is stretched in one direction. Edges, occlusion and such spectra are what photographs have too, so features that tell these
    images apart are useful for photographs.

    The images are drawn when they are first asked for, in memory, 3 ms each for 32 pixels and 20 leaves. No data set is
    read: a network trained on them knows nothing about anybody, and is public.

    Args:
        examples: images to train on.
        size: edge in pixels.
        leaves: shapes in an image.
        seed: of the images. Another one gives other images.
        batch_size: see :class:`~lightning_dp.data.sets.SetsDataModule`.
        val_batch_size: likewise.
        num_workers: likewise.
        mean: likewise.
        std: likewise.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> data = RandomProcessImages(examples=10, size=16, leaves=4)
        >>> data.setup()
        >>> image, label = data.train_set[7]
        >>> image.shape, image.dtype, label
        (torch.Size([3, 16, 16]), torch.uint8, 7)

    Source: M. Baradad, J. Wulff, T. Wang, P. Isola and A. Torralba 2021 (arXiv 2106.05963) for learning from such images, of
    which this is one of the simpler kinds; X. Tang, A. Panda, V. Sehwag and P. Mittal 2023 (arXiv 2306.06076) for doing so
    before private training, with images of untrained generative networks.
    """

    def __init__(
        self,
        examples: int = 20_000,
        size: int = 32,
        leaves: int = 20,
        seed: int = 0,
        batch_size: int = 128,
        val_batch_size: int = 500,
        num_workers: int = 0,
        mean: Triple = (0.5, 0.5, 0.5),
        std: Triple = (0.25, 0.25, 0.25),
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, mean=mean, std=std
        )
        for name, value, least in (
            ("examples", examples, 1),
            ("size", size, 2),
            ("leaves", leaves, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value}: expected at least {least}.")
        self.examples, self.size, self.leaves, self.seed = examples, size, leaves, seed

    @override
    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Draw the images; validation and test are the last of them, at most 500."""
        images = torch.empty(self.examples, 3, self.size, self.size, dtype=torch.uint8)
        for start in trange(0, self.examples, CHUNK, desc="Drawing images", leave=False):
            generator = torch.Generator().manual_seed(self.seed * 2**32 + start)
            drawn = dead_leaves(CHUNK, self.size, self.leaves, generator)
            images[start : start + CHUNK] = drawn[: self.examples - start]
        arrays = images.permute(0, 2, 3, 1).numpy()
        whole = ImageArray(arrays, torch.arange(self.examples).numpy())
        last = ImageArray(arrays[-500:], torch.arange(self.examples).numpy()[-500:])
        return whole, last, last


def dead_leaves(count: int, size: int, leaves: int, generator: torch.Generator) -> Tensor:
    """``count`` images of dead leaves, ``(count, 3, size, size)`` uint8, a function of the generator's state.

    Args:
        count: images.
        size: edge in pixels.
        leaves: shapes in each, the largest first.
        generator: where all randomness comes from.
    """
    draw = _Draw(count, size, generator)
    middle = (size - 1) / 2
    down, across = torch.arange(size).view(1, size, 1) - middle, torch.arange(size).view(1, 1, size) - middle
    image = draw.texture()
    for place in range(leaves):
        share = draw.uniform(3) * (leaves / (place + 1) - 1) + 1  # radii fall as the root of 1 / place, with a tail
        radius = (size / 2 * (share / leaves).sqrt()).clamp(min=1.2, max=0.6 * size)
        x, y = across - draw.spread(3, 1.1 * size), down - draw.spread(3, 1.1 * size)
        angle, stretch = draw.spread(3, 2 * math.pi), torch.exp(draw.spread(3, 1.6))
        along = ((x * angle.cos() + y * angle.sin()) * stretch / radius).abs().clamp(min=1e-4)
        beside = ((y * angle.cos() - x * angle.sin()) / stretch / radius).abs().clamp(min=1e-4)
        power = torch.tensor([1.0, 2.0, 4.0, 12.0])[draw.choice(4)].view(-1, 1, 1)  # rhombus, ellipse, ..., rectangle
        inside = 1 - (along**power + beside**power) ** (1 / power)
        cover = (inside * radius + 0.5).clamp(0, 1).unsqueeze(1)  # about a pixel wide, so that edges are smooth
        image = image * (1 - cover) + draw.texture() * cover
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)


class _Draw:
    """Random numbers and textures for ``count`` images at once."""

    def __init__(self, count: int, size: int, generator: torch.Generator) -> None:
        self.count, self.size, self.generator = count, size, generator
        self.down, self.across = torch.fft.fftfreq(size).view(-1, 1), torch.fft.rfftfreq(size).view(1, -1)

    def uniform(self, axes: int) -> Tensor:
        """One number in [0, 1) for each image, with ``axes`` axes in all."""
        return torch.rand(self.count, *[1] * (axes - 1), generator=self.generator)

    def spread(self, axes: int, width: float) -> Tensor:
        """The same in ±width / 2."""
        return (self.uniform(axes) - 0.5) * width

    def choice(self, options: int) -> Tensor:
        return torch.randint(options, (self.count,), generator=self.generator)

    def texture(self) -> Tensor:
        """A colour and noise upon it, part of which has the same value in all channels."""
        colour = torch.rand(self.count, 3, 1, 1, generator=self.generator)
        grey, coloured = self._noise(1), self._noise(3)
        mix, strength = 0.6 * self.uniform(4), 0.35 * self.uniform(4) ** 1.5
        return colour + strength * ((1 - mix) * grey + mix * coloured)

    def _noise(self, channels: int) -> Tensor:
        """Noise of unit variance with a spectrum 1 / |f|^a, a from 0.5 to 2.5, stretched up to e² times in one direction."""
        angle, stretch = math.pi * self.uniform(3), torch.exp(2 * self.uniform(3))
        along = (self.across * angle.cos() + self.down * angle.sin()) * stretch
        beside = self.down * angle.cos() - self.across * angle.sin()
        radius = (along**2 + beside**2).sqrt().clamp(min=1 / self.size)
        spectrum = radius ** -(0.5 + 2 * self.uniform(3))
        white = torch.randn(self.count, channels, self.size, self.size, generator=self.generator)
        noise = torch.fft.irfft2(torch.fft.rfft2(white) * spectrum.unsqueeze(1), s=(self.size, self.size))
        noise = noise - noise.mean((2, 3), keepdim=True)
        scaled: Tensor = noise / noise.std((2, 3), keepdim=True).clamp(min=1e-6)
        return scaled
