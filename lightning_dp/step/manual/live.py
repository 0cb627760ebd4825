"""A training_step under manual optimization while it runs: what it has done so far, and which of its steps is wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_dp.engines.accumulate import Accumulated
from lightning_dp.step.logs import Recording
from lightning_dp.step.manual.late_logs import KnownLoss
from lightning_dp.step.manual.same_draws import SameDraws
from lightning_dp.step.manual.step_sample import StepSample
from lightning_dp.step.manual.values_over_steps import ValuesOverSteps


@dataclass(frozen=True)
class Wanted:
    """The private step whose gradient is wanted.

    Attributes:
        rest: what Lightning passes to training_step after the batch.
        number: of the step among those of training_step, from 0.
        place: of its optimizer.
        parameters: of the optimizer, by name.
        began_at: ``global_step`` at the beginning of training_step.
    """

    rest: tuple[Any, ...]
    number: int
    place: int
    parameters: dict[str, nn.Parameter]
    began_at: int


@dataclass
class Live:
    """One training_step under way."""

    rest: tuple[Any, ...]
    sample: StepSample
    parameters: list[dict[str, nn.Parameter]]
    values: ValuesOverSteps
    draws: SameDraws
    began_at: int
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)
    known: list[KnownLoss] = field(default_factory=list)
    stepped: list[int] = field(default_factory=list)
    total: Accumulated | None = None
    recording: Recording | None = None
    logged: int = 0
