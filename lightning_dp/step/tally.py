"""What is counted, and carried on, over the steps of a fit."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_dp.accounting import Ledger
from lightning_dp.mechanism.filtering import FilterState
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.step.never_moved import NeverMoved


@dataclass
class Tally:
    """Counts that go on when a run is replaced by another, as when parameters are thawed.

    Attributes:
        unused_samples: how many samples were drawn and not stepped on. Public: the code alone decides on it.
        broken: how many gradients were not finite and contributed zero, on the device. **Private**.
        never_moved: parameters that no example has moved. **Private**.
        carried: what the mechanism carries to the next step. Public.
        noise_std: the standard deviation of the noise on each coordinate of the last gradient that was released. Public.
        filtered: what a gradient filter carries to the next step. Public.
        released: the mechanism of the last release, with the C and the σ that it had. Public.
    """

    unused_samples: int = 0
    broken: Tensor | int = 0
    never_moved: NeverMoved = field(default_factory=NeverMoved)
    carried: MechanismState = NOTHING
    noise_std: float = 0.0
    filtered: FilterState = field(default_factory=FilterState)
    released: Mechanism | None = None

    @property
    def not_finite(self) -> int:
        """``broken`` as a number, for which the host waits."""
        return int(self.broken)

    def next_step(self, ledger: Ledger) -> int:
        """The number of the next sample in the run's life: one for each charged, and one for each drawn in vain."""
        return ledger.steps + self.unused_samples
