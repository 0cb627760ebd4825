"""The scattering transform of images: fixed filters, nothing learned, so nothing about the training data to protect."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class Scattering2d(nn.Module):
    """Averages of wavelet coefficients' magnitudes, up to second order: ``(N, C, S, S)`` to ``(N, C·P, S/2^J, S/2^J)``.

    For each colour there are P = 1 + L·J + L²·J(J−1)/2 paths (81 for J = 2, L = 8): the image blurred; the magnitude of
    each of L·J Morlet wavelets' answer, blurred; and the magnitude of a coarser wavelet's answer to that, blurred. All
    filters are fixed functions of ``size``, ``scales`` and ``angles``. The output of an example depends on that example
    alone, so computing it beforehand is no release and costs no privacy.

    The module has no parameters. Its work is done by FFTs in float32; images are mirrored at the border.

    Args:
        size: S, the images' edge; a multiple of 2^J.
        scales: J, the number of scales; the output is smaller by 2^J.
        angles: L, the number of orientations.

    Raises:
        ValueError: ``size`` is no multiple of 2^J or so small that it cannot be mirrored, or a number is below 1.

    Example:
        >>> Scattering2d(size=32)(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 243, 8, 8])

    Source: J. Bruna and S. Mallat, *Invariant Scattering Convolution Networks*, 2013 (arXiv 1203.1513); the filters'
    widths and frequencies (σ = 0.8·2^j, ξ = 3π/4·2^−j, slant 4/L) are those of M. Andreux et al., *Kymatio*, 2020
    (arXiv 1812.11214), which F. Tramèr and D. Boneh 2021 (arXiv 2011.11660) used for private learning.
    """

    phi: Tensor
    psi: Tensor

    def __init__(self, size: int = 32, scales: int = 2, angles: int = 8) -> None:
        super().__init__()
        if scales < 1 or angles < 1:
            raise ValueError(f"scales={scales}, angles={angles}: expected at least 1 of each.")
        self.size, self.scales, self.angles = size, scales, angles
        self.margin = 2**scales
        if size % self.margin or size <= self.margin:
            raise ValueError(
                f"size={size} with scales={scales}: expected a multiple of {self.margin} above {self.margin}. Resize the "
                "images, or give fewer scales."
            )
        padded = size + 2 * self.margin
        wavelets = [
            morlet(padded, 2**j, math.pi * k / angles, 4 / angles) for j in range(scales) for k in range(angles)
        ]
        self.register_buffer("psi", torch.stack(wavelets).reshape(scales, angles, padded, padded), persistent=False)
        self.register_buffer("phi", gaussian(padded, 0.8 * 2 ** (scales - 1)), persistent=False)

    @property
    def paths(self) -> int:
        """P, the number of output channels for each channel of the image."""
        return 1 + self.angles * self.scales + self.angles**2 * self.scales * (self.scales - 1) // 2

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the scattering coefficients of images."""
        if images.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"images of shape {tuple(images.shape)}: expected (batch, channels, {self.size}, {self.size}). Resize "
                "them, or give Scattering2d(size=...) their edge."
            )
        spectrum = torch.fft.fft2(F.pad(images.float(), [self.margin] * 4, mode="reflect")).unsqueeze(2)
        paths = [self._blurred(spectrum, 0)]
        second = []
        for j in range(self.scales):
            magnitude = self._answer(spectrum, self.psi[j], 0, j)  # (N, C, L, ., .) at 1/2^j of the resolution
            paths.append(self._blurred(magnitude, j))
            for coarser in range(j + 1, self.scales):
                response = self._answer(magnitude.unsqueeze(3), self.psi[coarser], j, coarser)
                second.append(self._blurred(response.flatten(2, 3), coarser))
        return torch.cat([*paths, *second], dim=2).flatten(1, 2)

    def _answer(self, spectrum: Tensor, filters: Tensor, at: int, to: int) -> Tensor:
        """Spectrum of |x ⋆ ψ|, from resolution 2^-at to 2^-to."""
        response = torch.fft.ifft2(filtered(spectrum, periodised(filters, 2**at), 2 ** (to - at)))
        magnitude = (response.real.square() + response.imag.square()).sqrt()  # faster than abs()
        spectrum_of_it: Tensor = torch.fft.fft2(magnitude)
        return spectrum_of_it

    def _blurred(self, spectrum: Tensor, at: int) -> Tensor:
        """The convolution x ⋆ φ at the output's resolution, without the mirrored margin."""
        low = filtered(spectrum, periodised(self.phi, 2**at), 2 ** (self.scales - at))
        blurred: Tensor = torch.fft.ifft2(low).real
        return blurred[..., 1:-1, 1:-1]

    @override
    def extra_repr(self) -> str:
        return f"size={self.size}, scales={self.scales}, angles={self.angles}"


def gaussian(
    size: int, width: float, at: tuple[float, float] = (0.0, 0.0), angle: float = 0.0, slant: float = 1.0
) -> Tensor:
    """Spectrum, ``(size, size)``, of a sampled Gaussian window of sum 1, moved to the frequency ``at`` (row, column).

    Args:
        size: edge of the periodic image.
        width: standard deviation in pixels, along ``angle``.
        at: centre in the frequency plane, radians per pixel.
        angle: of the axis along which ``width`` is meant.
        slant: ``width`` divided by the standard deviation across.

    Example:
        >>> gaussian(8, 1.0)[0, 0].item()
        1.0
    """
    frequencies = 2 * math.pi * torch.fft.fftfreq(size, dtype=torch.float64)
    spectrum = torch.zeros(size, size, dtype=torch.float64)
    for row in (-1, 0, 1):  # sampling repeats the spectrum at every 2π
        for column in (-1, 0, 1):
            y = (frequencies + 2 * math.pi * row - at[0])[:, None]
            x = (frequencies + 2 * math.pi * column - at[1])[None, :]
            along = math.cos(angle) * x + math.sin(angle) * y
            across = math.cos(angle) * y - math.sin(angle) * x
            spectrum += torch.exp(-0.5 * width**2 * (along**2 + (across / slant) ** 2))
    return (spectrum / spectrum.max().clamp_min(1.0)).float()


def morlet(size: int, scale: int, angle: float, slant: float) -> Tensor:
    """Spectrum, ``(size, size)``, of a Morlet wavelet: a Gaussian window times a wave, less what makes its sum zero.

    Args:
        size: edge of the periodic image.
        scale: 2^j.
        angle: of the wave.
        slant: width along the wave divided by the width across it.

    Example:
        >>> morlet(16, 1, 0.0, 0.5)[0, 0].item()
        0.0
    """
    width, frequency = 0.8 * scale, 0.75 * math.pi / scale
    wave = gaussian(size, width, (frequency * math.sin(angle), frequency * math.cos(angle)), angle, slant)
    window = gaussian(size, width, (0.0, 0.0), angle, slant)
    return wave - wave[0, 0] / window[0, 0] * window


def filtered(spectrum: Tensor, filters: Tensor, by: int) -> Tensor:
    """Spectrum of every ``by``-th sample, along the last two axes, of an image that was filtered.

    Keeping every ``by``-th sample adds up the ``by``² blocks of a spectrum, which is done block by block here because
    the whole product is large.
    """
    if by == 1:
        return spectrum * filters
    edge = spectrum.shape[-1] // by
    places = [slice(i * edge, (i + 1) * edge) for i in range(by)]
    blocks = [spectrum[..., row, column] * filters[..., row, column] for row in places for column in places]
    return torch.stack(blocks).sum(0) / by**2 if by > 2 else (blocks[0] + blocks[1] + blocks[2] + blocks[3]) / 4


def periodised(spectrum: Tensor, by: int) -> Tensor:
    """A filter's spectrum for images sampled ``by`` times more coarsely: its aliases added up."""
    edge = spectrum.shape[-1] // by
    return spectrum.reshape(*spectrum.shape[:-2], by, edge, by, edge).sum(dim=(-4, -2))
