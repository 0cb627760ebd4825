"""A privacy loss on an even grid: cells around the nodes, and a shift that keeps the mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from lightning_dp.accounting.rdp import FloatArray


class Loss(Protocol):
    """A privacy loss that is cut to an interval."""

    def probability(self, left: npt.NDArray[Any], right: npt.NDArray[Any]) -> FloatArray:
        """P(left < loss <= right) of adjoining cells."""

    def mean(self) -> float:
        """The mean."""


@dataclass(frozen=True)
class Grid:
    """An even number of evenly spaced nodes.

    Args:
        first: the first node.
        last: the last, up to rounding.
        size: how many.
    """

    first: float
    last: float
    size: int

    @property
    def step(self) -> float:
        """The distance of neighbours."""
        return (self.last - self.first) / (self.size - 1)

    @property
    def end(self) -> float:
        """The last node, as the distance gives it."""
        return self.first + (self.size - 1) * self.step


def discretised(loss: Loss, grid: Grid) -> tuple[FloatArray, float]:
    """The probabilities of the cells around the nodes, and by how much the nodes have to move for the loss's mean.

    Gopi, Lee and Wutschitz (2021), Algorithm 2. It is what ``prv_accountant.discretisers.CellCentred`` computes, to the bit,
    without that package, which takes a second to import; a test holds the two together.

    Raises:
        RuntimeError: the means differ by half a cell or more.
    """
    nodes = np.linspace(grid.first, grid.end, grid.size, dtype=np.longdouble)
    mass = loss.probability(nodes - grid.step / 2.0, nodes + grid.step / 2.0)
    shift = loss.mean() - np.dot(nodes, mass)
    if not abs(shift) < grid.step / 2.0:
        raise RuntimeError("the mean on the grid differs from the loss's by half a cell or more")
    return mass, float(shift)
