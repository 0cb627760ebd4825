"""One step's sample, for the releases that manual optimization makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lightning_dp.engines.accumulate import Accumulated
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.step.manual.same_draws import SameDraws

Parameters = Mapping[str, nn.Parameter]
TryEngines = Callable[[LossFunction, Parameters], Selection]
"""The engine for one loss, tried on the first examples."""
MicroBatches = Iterable[tuple[Any, int]]


class Release(Protocol):
    """From this rank's clipped sum to the noisy gradient: release ``part`` of at most ``parts``."""

    def __call__(self, gradient: Mapping[str, Tensor], *, part: int, parts: int) -> dict[str, Tensor]:
        """Charges at the first part."""


@dataclass
class StepSample:
    """The sample of one step on this rank, and what may be done with it.

    Attributes:
        micro_batches: reads the sample, once.
        sum_clipped: ``(selection, loss, parameters, micro-batches)`` → the sum of clipped gradients, **private**.
        release: from there to the noisy gradient.
        try_engines: finds an engine for a loss.
        forked_rng: torch's global generators seeded for this step.
        charged: whether anything has been released.
    """

    micro_batches: Callable[[], MicroBatches]
    sum_clipped: Callable[[Selection, LossFunction, Parameters, MicroBatches], Accumulated]
    release: Release
    try_engines: TryEngines
    forked_rng: Callable[[], AbstractContextManager[None]]
    charged: bool = False
    _kept: list[tuple[Any, int]] | None = field(default=None, init=False)

    def clipped_sum(
        self, loss_function: LossFunction, parameters: Parameters, selection: Selection, draws: SameDraws | None
    ) -> Accumulated:
        """The sum of this rank's clipped gradients.

        Args:
            loss_function: of one example.
            parameters: of which gradients are taken, by name.
            selection: the engine.
            draws: keeps random numbers for a further release of the sample, for which the sample is kept in memory as
                well; ``None`` if there is none.
        """
        if draws is None:
            return self.sum_clipped(selection, loss_function, parameters, self.micro_batches())
        self._kept = list(self.micro_batches()) if self._kept is None else self._kept
        with draws.one_pass():
            return self.sum_clipped(selection, loss_function, parameters, draws.counted(self._kept))

    def released(self, total: Accumulated, part: int, parts: int) -> dict[str, Tensor]:
        """The noisy gradient of part ``part`` of at most ``parts`` that the sample releases, charged for."""
        self.charged = True
        return self.release(total.gradient, part=part, parts=parts)
