"""The processes that train together, as one of them sees them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

T = TypeVar("T")

Gather = Literal["step", "layer"]
"""How long sharded parameters are whole: for a step, or each only while its layer runs."""


@dataclass(frozen=True)
class World:
    """Who trains, told once, so that nothing has to ask a Lightning strategy.

    Attributes:
        rank: this process's number among all processes of the run, 0 without several.
        size: how many processes train together.
        device: on which this one works.
        neighbours: how many of them run on this machine, this one included.
        gather: how long sharded parameters are whole.
    """

    rank: int
    size: int
    device: torch.device
    neighbours: int = 1
    gather: Gather = "step"
    _strategy: Strategy | None = field(default=None, repr=False, compare=False)

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank. A collective call; ``value`` has to be picklable."""
        sent: T = value if self._strategy is None else self._strategy.broadcast(value)
        return sent

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, on every rank. A collective call."""
        return self._reduced(tensor, "sum")

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of the ranks' tensors, on every rank. A collective call, and nothing for a private sum."""
        return self._reduced(tensor, "mean")

    def _reduced(self, tensor: Tensor, how: Literal["sum", "mean"]) -> Tensor:
        total: Tensor = tensor if self._strategy is None else self._strategy.reduce(tensor, reduce_op=how)
        return total


def world_of(strategy: Strategy) -> World:
    """The processes of a strategy, which know each other's number (from Lightning's ``setup`` hooks on)."""
    return World(
        rank=int(getattr(strategy, "global_rank", 0)),
        size=int(getattr(strategy, "world_size", 1)),
        device=strategy.root_device,
        neighbours=max(1, int(getattr(strategy, "num_processes", 1))),
        gather=getattr(strategy, "gather", "step"),
        _strategy=strategy,
    )
