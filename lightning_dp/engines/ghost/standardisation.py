"""Standardised weights, w = gain · s · (v − mean v) / ‖v − mean v‖: recognised in full once, from then on by their values.

The way back through such a weight is known: α = gain · s / ‖v − mean v‖ times what of a gradient is across 1 and w, and for
the gain s times the component along v − mean v. To find that out takes three directions sent back through autograd (see
:mod:`lightning_dp.engines.ghost.projection`), which was most of what standardisation cost a small micro-batch. So it is
done once for a layer. Afterwards the formula is taken as long as the weight *is* what the formula says, to rounding, and
all is found anew as soon as it is not. Norms and sums come from the same formula, so a clipped gradient's bound rests on
neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.projection import Projection, WayBack, find_projection
from lightning_dp.mechanism.put_off import is_so


class Recognised:
    """The standardised weights of a module, by the name of v."""

    def __init__(self) -> None:
        self._known: dict[str, _Standardised] = {}

    def projection(
        self, weight: Tensor, parameters: Mapping[str, Tensor], way_back: WayBack, buffers: Buffers
    ) -> Projection | None:
        """The projection by which ``weight`` was computed, or ``None`` if it was computed in another way.

        Args:
            weight: w, ``(p, ...)``, without a graph.
            parameters: what it may have been computed from, by name, without graphs.
            way_back: gradients of w → gradients of those it was computed from.
            buffers: where to take memory for directions.
        """
        for name in parameters:
            if name in self._known:
                known = self._known[name].projection(weight, parameters, buffers)
                if known is not None:
                    return known
        found = find_projection(weight, {name: p.shape for name, p in parameters.items()}, way_back, buffers)
        if found is not None:
            standardised = _Standardised.of(found, weight, parameters, buffers)
            if standardised is not None:
                self._known[found.name] = standardised
        return found


@dataclass(frozen=True)
class _Standardised:
    """A weight of which only v and the gain may change.

    Attributes:
        name: v.
        gain: the gain, if there is one.
        lengths: s, ``(p, 1)``.
    """

    name: str
    gain: str | None
    lengths: Tensor

    @classmethod
    def of(
        cls, found: Projection, weight: Tensor, parameters: Mapping[str, Tensor], buffers: Buffers
    ) -> _Standardised | None:
        """What there is to remember, if the way back that was ``found`` is that of a standardised weight."""
        if len(found.gains) > 1:
            return None
        gain = next(iter(found.gains), None)
        along, _ = _direction(parameters[found.name], torch.empty_like(weight.flatten(1)))
        reach = torch.linalg.vecdot(weight.flatten(1), along).unsqueeze(1)
        known = cls(found.name, gain, reach if gain is None else reach / parameters[gain].reshape(-1, 1))
        claimed = known.projection(weight, parameters, buffers)
        if claimed is None:
            return None
        sizes = found.scale.abs()
        errors = [(claimed.scale - found.scale).abs() / sizes, found.within.abs().amax((1, 2)) / sizes]
        if gain is not None:  # the directions along w and along v may be opposite
            signs = torch.linalg.vecdot(found.basis[:, :, 1], claimed.basis[:, :, 1]).sign().unsqueeze(1)
            missed = (found.gains[gain] * signs - claimed.gains[gain]).abs().amax(1)
            errors.append(missed / known.lengths.squeeze(1).abs())
        return known if bool((torch.stack(errors) <= _tolerance(weight)).all()) else None

    def projection(self, weight: Tensor, parameters: Mapping[str, Tensor], buffers: Buffers) -> Projection | None:
        """The projection, if ``weight`` is what the formula makes of the parameters."""
        v, rows = parameters[self.name], weight.flatten(1)
        if v.shape != weight.shape or not v.dtype == weight.dtype == self.lengths.dtype:
            return None
        basis = buffers.take((3, *rows.shape), like=rows)
        basis[0] = rows.shape[1] ** -0.5
        along, size = _direction(v, basis[1])
        reach = self.lengths if self.gain is None else self.lengths * parameters[self.gain].reshape(-1, 1)
        missed = torch.addcmul(rows, along, reach, value=-1, out=basis[2]).norm(dim=1)
        if is_so((missed <= _tolerance(weight) * reach.squeeze(1).abs()).logical_not_().any()):
            return None
        scale = reach / size

        def way_back(gradients: Tensor, batched: bool) -> dict[str, Tensor]:
            given = gradients.to(weight.dtype).reshape(-1, *rows.shape)
            components = torch.linalg.vecdot(given, along).unsqueeze(2)
            across = given - given.mean(2, keepdim=True)
            across.addcmul_(along, components, value=-1).mul_(scale)
            of_gain = {} if self.gain is None else {self.gain: components * self.lengths}
            found = {self.name: across, **of_gain}
            return {name: g.reshape(*[len(given)] * batched, *parameters[name].shape) for name, g in found.items()}

        nothing = torch.zeros_like(self.lengths)
        gains = {} if self.gain is None else {self.gain: torch.cat([nothing, self.lengths], dim=1)}
        within = rows.new_zeros(len(rows), 2, 2)
        return Projection(self.name, scale.squeeze(1), basis[:2].permute(1, 2, 0), within, gains, way_back)


def _direction(v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """(v − mean v) / ‖v − mean v‖ of each channel, ``(p, n)``, and that length, ``(p, 1)``."""
    rows = v.flatten(1)
    along = torch.sub(rows, rows.mean(1, keepdim=True), out=out)
    along -= along.mean(1, keepdim=True)
    size = along.norm(dim=1, keepdim=True)
    return along.div_(size), size


def _tolerance(weight: Tensor) -> float:
    """How far rounding may take a weight from its formula, relative to its size."""
    return 1000 * torch.finfo(weight.dtype).eps
