"""Weights that are scaled projections of a parameter, channel by channel: weight standardisation, weight normalisation.

For w = gain · (v − mean v) / ‖v − mean v‖, or v / ‖v‖, the way back from a gradient G of w to one of v is, for each
output channel, α · G outside the span of the vectors 1 and w, and a 2 × 2 matrix within. So an example's norm needs
three numbers for each channel, ‖G‖ and its two components, instead of the whole way back. Nobody has to say which layer
is of this kind: α and the matrix are found with three probes, and whether they explain the probes is checked, each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.engines.ghost.contribution import ROUNDING, Contribution, Written
from lightning_dp.functional.clip import accumulation_dtype, per_example_norms

PROBES = 3
WayBack = Callable[[Tensor, bool], dict[str, Tensor]]
"""Gradients of a weight, one or (flag) a stack of them → gradients of the parameters it was computed from, by name."""


@dataclass(frozen=True)
class Projection:
    """The way back from w, ``(p, ...)`` with n numbers per channel, to the parameter v of its shape, and to gains.

    Attributes:
        name: v.
        scale: α, ``(p,)``.
        basis: an orthonormal basis of span{1, w}, ``(p, n, 2)``.
        within: the way back within the span, ``(p, 2, 2)``.
        gains: parameter with a number per channel → what its gradient is of the two components, ``(p, 2)``.
        way_back: the whole of it.
    """

    name: str
    scale: Tensor
    basis: Tensor
    within: Tensor
    gains: dict[str, Tensor]
    way_back: WayBack

    def contributions(self, gradients: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Contribution]:
        """What ``gradients`` of w, ``(B, *w.shape)``, contribute to each parameter of the given shapes."""
        rows = gradients.flatten(2).to(self.scale.dtype)
        components = torch.bmm(rows.transpose(0, 1), self.basis)  # (p, B, 2)
        found: dict[str, Contribution] = {self.name: _Projected(self, gradients, rows, components)}
        for name, gain in self.gains.items():
            of_gain = torch.bmm(components, gain.unsqueeze(-1)).squeeze(-1).t()
            found[name] = Written(of_gain.reshape(len(rows), *shapes[name]))
        return found


class _Projected:
    """The contribution to v."""

    def __init__(self, projection: Projection, gradients: Tensor, rows: Tensor, components: Tensor) -> None:
        self._projection, self._gradients, self._components = projection, gradients, components
        examples, channels = rows.shape[:2]
        self._sizes = per_example_norms({"": rows.flatten(0, 1)}).view(examples, channels)

    def norms(self) -> Tensor:
        """Norms, rounded up where most of a gradient is in the span and drops out, see ``gram_norms``."""
        within = torch.bmm(self._components, self._projection.within.transpose(1, 2)).square().sum(2).t()
        all_squares = self._sizes.square()
        outside = (all_squares - self._components.square().sum(2).t()).clamp(min=0)
        allowance = ROUNDING * torch.finfo(all_squares.dtype).eps * all_squares
        total: Tensor = (self._projection.scale.square() * (outside + allowance) + within).sum(1).sqrt()
        return total

    def weighted_sum(self, factors: Tensor) -> Tensor:
        total = Written(self._gradients).weighted_sum(factors)
        return self._projection.way_back(total, False)[self._projection.name]

    def rows(self) -> Tensor:
        return self._projection.way_back(self._gradients, True)[self._projection.name]

    def without(self, broken: Tensor) -> Contribution:
        gradients = self._gradients.masked_fill(broken.view(-1, *[1] * (self._gradients.ndim - 1)), 0)
        components = self._components.masked_fill(broken.view(1, -1, 1), 0)
        return _Projected(self._projection, gradients, gradients.flatten(2).to(components.dtype), components)


def find_projection(weight: Tensor, shapes: Mapping[str, torch.Size], way_back: WayBack) -> Projection | None:
    """The projection by which ``weight`` was computed, or ``None`` if it was computed in another way.

    Three random directions are sent back. Two and a bit determine α and the matrices; all must be explained, to
    rounding, which a way back of another kind does with probability zero (Freivalds 1977).

    Args:
        weight: w, without a graph, ``(p, ...)``.
        shapes: shapes of the parameters it may depend on.
        way_back: gradients of w → gradients of those it does depend on.
    """
    dtype = accumulation_dtype(weight.dtype)
    channels, per_channel = len(weight), math.prod(weight.shape[1:])
    of_its_shape = [name for name, shape in shapes.items() if shape == weight.shape]
    if len(of_its_shape) != 1 or per_channel < 4 or dtype != weight.dtype:
        return None
    (name,) = of_its_shape
    basis = _basis(weight.reshape(channels, per_channel))
    if basis is None:
        return None
    probes = _probes(basis)
    back = way_back(probes.reshape(PROBES, *weight.shape), True)
    if name not in back or any(math.prod(shapes[other]) != channels for other in back if other != name):
        return None

    inside = torch.einsum("kpn,pni->kpi", probes, basis)  # components of the probes
    outside = probes - torch.einsum("kpi,pni->kpn", inside, basis)
    returned = back[name].reshape(PROBES, channels, per_channel)
    returned_inside = torch.einsum("kpn,pni->kpi", returned, basis)
    scale = (outside * returned).sum((0, 2)) / outside.square().sum((0, 2))
    inverse = torch.linalg.inv(inside[:2].permute(1, 2, 0))  # columns: components of the first two probes
    within = returned_inside[:2].permute(1, 2, 0) @ inverse
    explained = scale[:, None] * outside + torch.einsum("pij,kpj,pni->kpn", within, inside, basis)
    errors = [(explained - returned).norm(dim=2) / (returned.norm(dim=2) + _TINY)]
    gains = {}
    for other, rows in back.items():
        if other != name:
            given = rows.reshape(PROBES, channels)
            gains[other] = torch.einsum("kp,pki->pi", given[:2], inverse)
            missed = (torch.einsum("pi,kpi->kp", gains[other], inside) - given).abs()
            errors.append(missed / (given.abs().amax(0) + _TINY))
    tolerance = 1000 * torch.finfo(dtype).eps
    if not all(bool((error <= tolerance).all()) for error in errors):
        return None
    return Projection(name, scale, basis, within, gains, way_back)


_TINY = 1e-30


def _basis(rows: Tensor) -> Tensor | None:
    """Orthonormal columns that span 1 and w of each channel, ``(p, n, 2)``; ``None`` if w is constant somewhere."""
    ones = torch.full_like(rows, rows.shape[1] ** -0.5)
    centred = rows - rows.mean(1, keepdim=True)
    centred = centred - centred.mean(1, keepdim=True)
    sizes = centred.norm(dim=1, keepdim=True)
    if not bool((sizes > 1e-3 * rows.norm(dim=1, keepdim=True)).all()):
        return None
    return torch.stack([ones, centred / sizes], dim=2)


def _probes(basis: Tensor) -> Tensor:
    """Random directions, another for each channel; the first two have known large components in the span."""
    channels, per_channel, _ = basis.shape
    step = 7
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(PROBES, per_channel + step * channels, generator=generator, dtype=torch.float64)
    windows = drawn.to(basis).unfold(1, per_channel, step)[:, :channels]
    probes = windows.clone()
    probes[:2] += per_channel**0.5 * basis.permute(2, 0, 1)
    return probes
