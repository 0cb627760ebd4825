"""The engine compared with plain backward passes while a run is under way: on one example, at a few random steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.engines.agreement import DisagreementError, tolerance_of
from lightning_dp.engines.comparison import compare_contributions
from lightning_dp.engines.fall_back import PATIENCE
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.plan.clipping import Clipping
from lightning_dp.step.planned import Run
from lightning_dp.step.undone import undone


def compares_at(key: RandomKey, step: int) -> bool:
    """Whether the engine is compared at this step: with probability 2/(step + 2), which the run's key decides.

    So always at step 0, at about 8 of the first 100 steps, and at about 5 more until the number of steps is ten times as large.

    Example:
        >>> [step for step in range(100) if compares_at(RandomKey.from_seed(0), step)][:3]
        [0, 1, 2]
    """
    return bool(key.generator(Stream.COMPARISONS, step).random() < 2 / (step + 2))


@dataclass
class EngineComparison:
    """One comparison, in one step: the micro-batches pass through it, and one example of them is looked at.

    Which example is chosen from the run's key, all of this rank's with equal probability. Its contribution is computed twice
    before the step's own pass over its micro-batch: by the engine and by ``loop``, in the precision and the mode of training.

    Args:
        run: under way.
        selection: whose engine is compared.
        step: the number of the step.
        examples: how many this rank has in it.
        clipping: of the step.
    """

    run: Run
    selection: Selection
    step: int
    examples: int
    clipping: Clipping

    def __post_init__(self) -> None:
        self._failure: DisagreementError | None = None

    @property
    def is_due(self) -> bool:
        """Whether this step has a comparison. The same on every rank."""
        return self.run.layers is None and compares_at(self.run.planned.key, self.step)

    def passed(
        self, micro_batches: Iterable[tuple[Any, int]], loss_function: LossFunction, parameters: Mapping[str, Tensor]
    ) -> Iterator[tuple[Any, int]]:
        """The micro-batches as they are; before the one that holds the example is given on, it is compared."""
        engine = self.selection.engine
        given_up = self.selection.failures.get(engine.name, 0) >= PATIENCE and len(self.selection.slower) > 0
        chosen = -1
        if self.examples and not engine.is_reference and not given_up:
            chosen = int(self._draws().integers(self.examples))
        before = 0
        for batch, size in micro_batches:
            if before <= chosen < before + size:
                self._compare(loss_function, parameters, batch_of_one(batch, chosen - before))
            before += size
            yield batch, size

    def check(self) -> None:
        """Stop this rank if the contributions differ, as an error of training_step would; the others find that it is gone.

        Raises:
            PreflightError: they do. Nothing of the step is released or charged.
        """
        if self._failure is not None:
            raise PreflightError(
                f"{self._failure} in step {self.step}: expected the same. Nothing of this step is released or charged. Before "
                "training they agreed on the first examples. Use engine='loop', which is the plain backward pass, and please "
                "report what training_step computes."
            ) from self._failure

    def _draws(self) -> np.random.Generator:
        planned = self.run.planned
        return planned.key.generator(Stream.COMPARISONS, self.step, planned.world.rank)

    def _compare(self, loss_function: LossFunction, parameters: Mapping[str, Tensor], example: Any) -> None:
        planned = self.run.planned
        with undone(planned.module):
            try:
                compare_contributions(
                    self.selection.engine,
                    loss_function,
                    parameters,
                    example,
                    self.clipping,
                    tolerance_of(planned.module.trainer.precision_plugin.precision),
                )
            except DisagreementError as failure:
                self._failure = failure
