"""Weights that are scaled projections of a parameter, channel by channel: weight standardisation, weight normalisation.

For w = gain · (v − mean v) / ‖v − mean v‖, or v / ‖v‖, the way back from a gradient G of w to one of v is, for each
output channel, α · G outside the span of the vectors 1 and w, and a 2 × 2 matrix within. So an example's norm needs
three numbers for each channel, ‖G‖ and its two components, instead of the whole way back. Nobody has to say which layer
is of this kind: α and the matrix are found by sending three directions back, and whether they explain what comes is checked,
each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.contribution import ROUNDING, Channels, Contribution, Factored, Norms, Written
from lightning_dp.engines.ghost.lost import of_rows
from lightning_dp.mechanism.clip import accumulation_dtype, per_example_norms

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

    def contributions(self, of_weight: Contribution, shapes: Mapping[str, torch.Size]) -> dict[str, Contribution]:
        """What a contribution to w contributes to each parameter of the given shapes."""
        channels = of_weight.channels(self.basis) if isinstance(of_weight, Factored) else None
        if channels is None:
            rows = of_weight.rows()
            of_weight, channels = Written(rows), _written_out(rows.flatten(2).to(self.scale.dtype), self.basis)
        found: dict[str, Contribution] = {self.name: _Projected(self, of_weight, channels)}
        for name, gain in self.gains.items():
            of_gain = torch.bmm(channels.components, gain.unsqueeze(-1)).squeeze(-1).t()
            found[name] = Written(of_gain.reshape(len(of_gain), *shapes[name]))
        return found


def _written_out(rows: Tensor, basis: Tensor) -> Channels:
    """What is known of gradients that are written out, ``(B, p, n)``."""
    squares = per_example_norms({"": rows.flatten(0, 1)}).view(rows.shape[:2]).square()
    examples, count = len(rows), rows.shape[2]
    components = torch.bmm(rows.transpose(0, 1), basis)
    return Channels(squares, torch.zeros_like(squares), components, lambda scale: of_rows(count, scale, examples))


class _Projected:
    """The contribution to v."""

    def __init__(self, projection: Projection, of_weight: Contribution, channels: Channels) -> None:
        self._projection, self._of_weight, self._channels = projection, of_weight, channels

    def norms(self) -> Norms:
        """Norms, rounded up where most of a gradient is in the span and drops out, see ``gram_norms``."""
        squares, components = self._channels.squares, self._channels.components
        within = torch.bmm(components, self._projection.within.transpose(1, 2)).square().sum(2).t()
        outside = (squares - components.square().sum(2).t()).clamp(min=0)
        allowance = ROUNDING * torch.finfo(squares.dtype).eps * squares + self._channels.errors
        values = (self._projection.scale.square() * (outside + allowance) + within).sum(1).sqrt()
        return Norms(values, self._channels.lost(self._projection.scale))

    def weighted_sum(self, factors: Tensor) -> Tensor:
        return self._projection.way_back(self._of_weight.weighted_sum(factors), False)[self._projection.name]

    def rows(self) -> Tensor:
        return self._projection.way_back(self._of_weight.rows(), True)[self._projection.name]

    def without(self, broken: Tensor) -> Contribution:
        return _Projected(self._projection, self._of_weight.without(broken), self._channels.without(broken))

    def only(self, index: int) -> Contribution:
        return Written(self._projection.way_back(self._of_weight.only(index).rows(), True)[self._projection.name])


def find_projection(
    weight: Tensor, shapes: Mapping[str, torch.Size], way_back: WayBack, buffers: Buffers
) -> Projection | None:
    """The projection by which ``weight`` was computed, or ``None`` if it was computed in another way.

    Sent back are the two basis vectors, which gives the matrices, and a random direction. That one gives α, and all that
    comes back for it must be explained, to rounding: a way back of another kind does that with probability zero
    (Freivalds 1977).

    Args:
        weight: w, without a graph, ``(p, ...)``.
        shapes: shapes of the parameters it may depend on.
        way_back: gradients of w → gradients of those it does depend on.
        buffers: where to take memory for the three directions.
    """
    channels, per_channel = len(weight), math.prod(weight.shape[1:])
    of_its_shape = [name for name, shape in shapes.items() if shape == weight.shape]
    if len(of_its_shape) != 1 or per_channel < 4 or accumulation_dtype(weight.dtype) != weight.dtype:
        return None
    (name,) = of_its_shape
    probes = _probes(weight.reshape(channels, per_channel), buffers)
    if probes is None:
        return None
    back = way_back(probes.view(PROBES, *weight.shape), True)
    if name not in back or any(math.prod(shapes[other]) != channels for other in back if other != name):
        return None

    basis = probes[:2].permute(1, 2, 0)  # (p, n, 2)
    random = probes[2]
    inside = _components(random, basis)  # (p, 2)
    returned = back[name].reshape(PROBES, channels, per_channel)
    within = torch.stack([_components(one, basis) for one in returned[:2]], dim=2)
    projected = (returned[2] * random).sum(1) - (_components(returned[2], basis) * inside).sum(1)
    squares = random.square().sum(1)
    outside = squares - inside.square().sum(1)
    if not bool((outside > 0.1 * squares).all()):
        return None  # the direction says nothing about α of some channel
    scale = projected / outside
    from_basis = torch.bmm(within, inside.unsqueeze(2)).squeeze(2) - scale[:, None] * inside
    missed = (random * scale[:, None]).sub_(returned[2])
    missed += torch.bmm(basis, from_basis.unsqueeze(2)).squeeze(2)
    errors = [missed.norm(dim=1) / (returned[2].norm(dim=1) + _TINY)]
    gains = {}
    for other, rows in back.items():
        if other != name:
            given = rows.reshape(PROBES, channels)
            gains[other] = given[:2].t()
            errors.append(((gains[other] * inside).sum(1) - given[2]).abs() / (given.abs().amax(0) + _TINY))
    tolerance = 1000 * torch.finfo(weight.dtype).eps
    if not bool((torch.stack(errors) <= tolerance).all()):
        return None
    return Projection(name, scale, basis, within, gains, way_back)


_TINY = 1e-30
_SEED = 7_046_029_254_386_353_131
"""Of the random direction: a number that nobody seeds weights with, so that the two have nothing in common."""


def _components(rows: Tensor, basis: Tensor) -> Tensor:
    return torch.bmm(rows.unsqueeze(1), basis).squeeze(1)


def _probes(rows: Tensor, buffers: Buffers) -> Tensor | None:
    """The two basis vectors of each channel, of 1 and of w, and a random one: ``(3, p, n)``.

    ``None`` if w is constant in some channel.
    """
    channels, per_channel = rows.shape
    probes = buffers.take((PROBES, channels, per_channel), like=rows)
    probes[0] = per_channel**-0.5
    centred = torch.sub(rows, rows.mean(1, keepdim=True), out=probes[1])
    centred -= centred.mean(1, keepdim=True)
    sizes = centred.norm(dim=1, keepdim=True)
    if not bool((sizes > 1e-3 * rows.norm(dim=1, keepdim=True)).all()):
        return None
    centred /= sizes
    step = 7  # windows of one random sequence: another direction for each channel
    generator = torch.Generator().manual_seed(_SEED)
    drawn = torch.randn(per_channel + step * channels, generator=generator, dtype=torch.float64)
    probes[2] = drawn.to(rows).unfold(0, per_channel, step)[:channels]
    return probes
