"""The scattering transform: against convolutions written out in space, and by its symmetries; the small network on it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_dp.models import Scattering2d, TanhCNN
from lightning_dp.models.scattering import gaussian, morlet


def images(count: int = 2, size: int = 16, channels: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def in_space(spectrum: Tensor) -> np.ndarray:
    return np.fft.ifft2(spectrum.double().numpy())


def convolved(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Circular convolution as the sum that defines it."""
    total = np.zeros_like(image, dtype=complex)
    for (i, j), weight in np.ndenumerate(kernel):
        total += weight * np.roll(image, (i, j), axis=(0, 1))
    return total


def by_sums(image: np.ndarray, scales: int, angles: int) -> np.ndarray:
    """All paths of one image of one colour, every filter a sum over pixels and every coarser grid a stride."""
    margin = 2**scales
    padded = np.pad(image, margin, mode="reflect")
    edge = len(padded)
    low = in_space(gaussian(edge, 0.8 * 2 ** (scales - 1)))
    waves = [
        [in_space(morlet(edge, 2**j, math.pi * k / angles, 4 / angles)) for k in range(angles)] for j in range(scales)
    ]

    def blurred(x: np.ndarray, at: int) -> np.ndarray:
        kernel = low[:: 2**at, :: 2**at] * 4**at
        stride = 2 ** (scales - at)
        return convolved(x, kernel).real[::stride, ::stride][1:-1, 1:-1]

    paths, second = [blurred(padded, 0)], []
    for j in range(scales):
        for wave in waves[j]:
            first = np.abs(convolved(padded, wave)[:: 2**j, :: 2**j])
            paths.append(blurred(first, j))
            for coarser in range(j + 1, scales):
                for other in waves[coarser]:
                    kernel, stride = other[:: 2**j, :: 2**j] * 4**j, 2 ** (coarser - j)
                    second.append(blurred(np.abs(convolved(first, kernel)[::stride, ::stride]), coarser))
    return np.stack([*paths, *second])


@pytest.mark.parametrize(("size", "scales", "angles"), [(8, 1, 3), (8, 2, 4)])
def test_it_is_what_the_sums_say(size: int, scales: int, angles: int) -> None:
    (image,) = images(1, size)
    found = Scattering2d(size, scales, angles)(image[None])[0].numpy()
    np.testing.assert_allclose(found, by_sums(image[0].double().numpy(), scales, angles), atol=2e-6)


def test_a_constant_image_has_its_mean_and_no_waves() -> None:
    found = Scattering2d(16, 2, 4)(torch.full((1, 1, 16, 16), 0.7))[0]
    torch.testing.assert_close(found[0], torch.full((4, 4), 0.7))
    assert float(found[1:].abs().max()) < 1e-6


def test_a_mirrored_wavelet_is_the_one_at_the_mirrored_angle() -> None:
    angles = 8
    filters = Scattering2d(16, 2, angles).psi
    mirrored = filters.flip(-1).roll(1, -1)  # frequency x to -x
    for k in range(1, angles):
        torch.testing.assert_close(mirrored[:, k], filters[:, angles - k])
        assert not torch.allclose(mirrored[:, k], filters[:, k - 1], atol=1e-2)


def test_an_image_decides_its_features_alone_and_nothing_is_learned() -> None:
    transform, batch = Scattering2d(16, 2, 4), images(3, channels=3)
    torch.testing.assert_close(transform(batch)[1:2], transform(batch[1:2]))
    assert transform(batch).shape == (3, 3 * transform.paths, 4, 4)
    assert list(transform.parameters()) == []
    assert not transform.state_dict()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match=r"size=30 with scales=2: expected a multiple of 4"):
        Scattering2d(30)
    with pytest.raises(ValueError, match=r"scales=0, angles=8: expected at least 1"):
        Scattering2d(scales=0)
    with pytest.raises(ValueError, match=r"images of shape \(1, 3, 8, 8\): expected \(batch, channels, 32, 32\)"):
        Scattering2d(32)(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"size=7: expected an even number"):
        TanhCNN(size=7)
    with pytest.raises(ValueError, match=r"groups=5 with in_channels=243: expected a divisor"):
        TanhCNN(groups=5)


def test_the_network_does_not_mind_the_scale_of_its_input() -> None:
    network = TanhCNN(size=4, in_channels=6, width=4, groups=2)
    inputs = images(3, 4, 6)
    torch.testing.assert_close(network(inputs), network(10 * inputs), rtol=1e-3, atol=1e-4)
    without = TanhCNN(size=4, in_channels=6, width=4, groups=0)
    assert not torch.allclose(without(inputs), without(10 * inputs), rtol=1e-3)
