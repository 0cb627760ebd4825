"""The Gaussian noise of one step."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lightning_dp.functional.randomness import RandomKey, Stream


def add_gaussian_noise(total: Tensor, *, noise_std: float, key: RandomKey, step: int) -> Tensor:
    """Add independent N(0, noise_std²) to every coordinate of ``total``, in place.

    Args:
        total: the flat sum of clipped gradients, shape ``(P,)``, float32 or float64.
        noise_std: σ·C. 0 leaves ``total`` as it is.
        key: where the noise comes from; its NOISE stream at ``step`` is used for nothing else.
        step: the number of the step in the run's life, from 0. A step's noise must be added exactly once: two
            releases with one (key, step) could be subtracted from each other.

    Returns:
        ``total``.

    Raises:
        TypeError: ``total`` is of another type: a complex one would get no noise in its imaginary part.

    Guarantee:
        With L2 sensitivity C this is the Gaussian mechanism with noise multiplier σ (Dwork and Roth 2014, Appendix A),
        up to floating point: the noise is a pseudorandom float, not a discrete Gaussian.

    On the CPU the numbers are NumPy's Philox under a 128-bit key (PyTorch's CPU generator would keep 32 bits of it);
    on CUDA they are PyTorch's Philox under a 63-bit key, drawn on the device.
    """
    if total.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"total of dtype={total.dtype}: expected torch.float32 or torch.float64. Sum in the accumulation type of "
            "lightning_dp.functional.clip, and store complex parameters as real ones (torch.view_as_real)."
        )
    if noise_std == 0 or total.numel() == 0:
        return total
    if total.device.type == "cuda":
        on_device = torch.Generator(device=total.device).manual_seed(key.torch_seed(Stream.NOISE, step))
        drawn = torch.randn(total.shape, generator=on_device, dtype=total.dtype, device=total.device)
        return total.add_(drawn, alpha=noise_std)
    generator = key.generator(Stream.NOISE, step)
    size = total.numel()
    normal: npt.NDArray[Any]
    if total.dtype == torch.float64:
        normal = generator.standard_normal(size, dtype=np.float64)
    else:
        normal = generator.standard_normal(size, dtype=np.float32)
    return total.add_(torch.from_numpy(normal).to(device=total.device, dtype=total.dtype), alpha=noise_std)
