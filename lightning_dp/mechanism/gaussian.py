"""The Gaussian noise of one step, in floating point."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dp.mechanism.noise import BLOCK, Parts, in_blocks
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.state import MechanismState

CUDA_BLOCK = 2**22
"""On CUDA fewer and larger blocks, for its streams have 63-bit keys."""


@dataclass(frozen=True)
class GaussianNoise:
    """N(0, noise_std²) on every coordinate: a :class:`~lightning_dp.mechanism.noise.Noise`.

    Args:
        noise_std: σ times the sensitivity.
    """

    noise_std: float

    def block(self, device: torch.device) -> int:
        """See :class:`~lightning_dp.mechanism.noise.Noise`."""
        return block_on(device)

    def add(
        self, parts: Parts, coordinates: int, *, key: RandomKey, step: int, state: MechanismState
    ) -> MechanismState:
        """:func:`add_gaussian_noise`, which leaves nothing to the next step."""
        add_gaussian_noise(parts, coordinates, noise_std=self.noise_std, key=key, step=step)
        return state

    def std(self, step: int, state: MechanismState) -> float:
        """The same in every step."""
        return self.noise_std

    def to_float(self, total: Tensor, divisor: float) -> Tensor:
        """In place."""
        return total.div_(divisor)

    def released(self, sums: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As the sums."""
        return sums


def block_on(device: torch.device) -> int:
    """How many coordinates share a stream on a device."""
    return CUDA_BLOCK if device.type == "cuda" else BLOCK


def add_gaussian_noise(parts: Parts, coordinates: int, *, noise_std: float, key: RandomKey, step: int) -> None:
    """Add independent N(0, noise_std²) to every coordinate of those parts of a flat sum that are this rank's, in place.

    The flat sum is cut into blocks of :data:`~lightning_dp.mechanism.noise.BLOCK` coordinates, each with a stream of its own.
    So the noise of a coordinate depends on (key, step, coordinate) alone: however ranks divide the coordinates among
    themselves, if each coordinate is one rank's, it gets its noise exactly once, and one rank and several, or a run that is
    resumed on fewer, add the same numbers. A block in which several ranks have coordinates is drawn by each of them.

    Args:
        parts: (place of a part's first coordinate in the flat sum, the part), contiguous, float32 or float64, in the order
            of their places. Of sums that are yet to be added up over the ranks, or already are.
        coordinates: P, of the flat sum; the same on every rank.
        noise_std: σ·C. 0 leaves the parts as they are.
        key: where the noise comes from; its NOISE stream at ``step`` is used for nothing else.
        step: the number of the step in the run's life, from 0. A step's noise must be added exactly once: two
            releases with one (key, step) could be subtracted from each other.

    Raises:
        TypeError: a part is of another type: a complex one would get no noise in its imaginary part.
        ValueError: parts overlap, or one reaches beyond P: it would have no noise, or another's too.

    Guarantee:
        With L2 sensitivity C the ranks' total is the Gaussian mechanism with noise multiplier σ (Dwork and Roth 2014,
        Appendix A), up to floating point: the noise is a pseudorandom float, not a discrete Gaussian.

    On the CPU the numbers are NumPy's Philox under a 128-bit key (PyTorch's CPU generator would keep 32 bits of it), each
    block in a stretch of its own; on CUDA they are PyTorch's Philox under a 63-bit key a block, drawn on the device.

    Example:
        >>> key, one, two = RandomKey.from_seed(0), torch.zeros(100_000), torch.zeros(100_000)
        >>> add_gaussian_noise([(0, one)], 100_000, noise_std=1.0, key=key, step=0)
        >>> for start, end in ((0, 7), (7, 99_000), (99_000, 100_000)):  # of three ranks
        ...     add_gaussian_noise([(start, two[start:end])], 100_000, noise_std=1.0, key=key, step=0)
        >>> torch.equal(one, two)
        True
    """
    check_floating(parts)
    some = next((part for _, part in parts if part.numel()), None)
    if some is None:
        return
    for block, length, here in in_blocks(parts, coordinates, block_on(some.device)):
        if noise_std == 0:
            continue
        normal = standard_normal(some.new_empty(length), key, step, block)
        for part, where in here:
            part.add_(normal[where], alpha=noise_std)


def check_floating(parts: Parts) -> None:
    """Refuse parts that would get no noise, or noise in one half of them.

    Raises:
        TypeError: a part is neither float32 nor float64.
    """
    for _, part in parts:
        if part.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"a part of dtype={part.dtype}: expected torch.float32 or torch.float64. Sum in the accumulation type of "
                "lightning_dp.mechanism.clip, and store complex parameters as real ones (torch.view_as_real)."
            )


def standard_normal(like: Tensor, key: RandomKey, step: int, block: int) -> Tensor:
    """The N(0, 1) numbers of a step's block of coordinates: as many as ``like`` has, of its type, on its device."""
    if like.device.type == "cuda":
        on_device = torch.Generator(device=like.device).manual_seed(key.torch_seed(Stream.NOISE, step, block))
        return torch.randn(like.shape, generator=on_device, dtype=like.dtype, device=like.device)
    generator = key.generator(Stream.NOISE, step, block=block)
    normal: npt.NDArray[Any]
    if like.dtype == torch.float64:
        normal = generator.standard_normal(like.numel(), dtype=np.float64)
    else:
        normal = generator.standard_normal(like.numel(), dtype=np.float32)
    return torch.from_numpy(normal).to(device=like.device, dtype=like.dtype)
