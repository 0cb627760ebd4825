"""One step while it is open: its sample on this rank, the sum of clipped gradients, and the release."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.engines.accumulate import Accumulated, accumulate
from lightning_dp.engines.fall_back import FallBack
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.layers.batch_norm import check_batch_norms_rest
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.mechanism.adaptive import in_force
from lightning_dp.mechanism.complex import as_real_pairs
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.seeded_globals import globals_put_back, seed_globals
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.step.contents import Contents, WriteError, check_nothing_written, tensors_of
from lightning_dp.step.engine_comparison import EngineComparison
from lightning_dp.step.planned import Run
from lightning_dp.step.refused_writes import undone_unless_written, with_line
from lightning_dp.step.sample_release import of_part, release_sample
from lightning_dp.step.tally import Tally
from lightning_dp.step.undone import undone

MicroBatches = Iterable[tuple[Any, int]]


@dataclass(frozen=True)
class OpenStep:
    """What may be done with the sample of one step.

    Attributes:
        run: what was decided before the first step.
        sample: this rank's part of the draw. **Private**.
        rest: what Lightning passes to training_step after the batch.
        tally: counts over the steps.
    """

    run: Run
    sample: LogicalBatch
    rest: tuple[Any, ...]
    tally: Tally

    @property
    def mechanism(self) -> Mechanism:
        """Of this step: that of the plan, with the C that is in force if C is adapted."""
        return in_force(self.run.planned.ledger.plan.mechanism, self.tally.carried)

    @property
    def share(self) -> Callable[[Any], Any] | None:
        """Takes from rank 0 what a rank without any example does not know; ``None`` if every rank has one, or none has."""
        world = self.run.planned.world
        return world.broadcast if 0 < self.sample.global_size < world.size else None

    def micro_batches(self) -> Iterator[tuple[Any, int]]:
        """The micro-batches on the device, with their views, and how many examples (or users) each holds. Once."""
        return self.run.planned.micro_batches(self.sample)

    @contextmanager
    def seeded(self, *counters: int) -> Iterator[None]:
        """The global generators seeded for this step, on this rank; otherwise with other ``counters``. Put back afterwards.

        What an example draws is its own, see :class:`~lightning_dp.batches.seeded.Seeded`.
        """
        planned = self.run.planned
        with globals_put_back(planned.world.device):
            seed = planned.key.torch_seed(Stream.DROPOUT, self.sample.step, planned.world.rank, *counters)
            seed_globals(seed, planned.world.device)
            yield

    def clipped_sum(
        self,
        selection: Selection,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        micro_batches: MicroBatches,
    ) -> Accumulated:
        """The sum of the clipped gradients of this rank's part of the sample. Nothing of it may be released.

        Args:
            selection: the engine.
            loss_function: of one example.
            parameters: of which gradients are taken, by name.
            micro_batches: of :meth:`micro_batches`.

        Raises:
            PreflightError: training_step wrote into a tensor of the module, or the engine gives a wrong gradient.
        """
        run, module = self.run, self.run.planned.module
        check_batch_norms_rest(module)
        before = run.planned.logs.state.contents()
        comparison = EngineComparison(
            run, selection, self.sample.step, len(self.sample.indices), self.mechanism.clipping
        )
        due, given = comparison.is_due, as_real_pairs(parameters)
        if due:
            micro_batches = comparison.passed(micro_batches, loss_function, given)
        engine = FallBack(
            selection,
            module,
            (PreflightError,),
            partial(undone_unless_written, module),
            lambda: tensors_of(module).values(),
        )
        seen: list[tuple[Any, int]] = []
        try:
            with before.put_back_on_error():
                with self.seeded(), run.planned.logs.state.passing() as anything_else_ran:
                    total = accumulate(
                        engine,
                        loss_function,
                        given,
                        _remembered(micro_batches, seen, anything_else_ran),
                        self.mechanism.clipping,
                        pad_to=run.pad_to,
                        apart=() if run.layers is None else run.layers.names,
                    )
                    if run.layers is not None:
                        run.layers.finish()
                if due:
                    comparison.check()
                check_nothing_written(module, before)
        except WriteError as error:
            raise self._with_line(error, before, loss_function, given, seen) from None
        self.tally.broken = self.tally.broken + total.broken
        self.tally.never_moved.look(total.gradient, total.examples)
        return total

    def _with_line(
        self,
        error: WriteError,
        before: Contents,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        seen: list[tuple[Any, int]],
    ) -> WriteError:
        """The refusal with the line that writes, if one of the last examples makes the write when it runs once more."""
        loop = LoopEngine()
        for batch, size in seen if self.run.layers is None else ():
            for index in range(min(size, ASKED_AGAIN)):
                with undone(self.run.planned.module), self.seeded():
                    call = partial(loop.clipped_sum, loss_function, parameters, batch_of_one(batch, index), 1, math.inf)
                    found = with_line(error, self.run.planned.module, before, call)
                if found.line is not None:
                    return found
        return error

    def release(self, gradient: Mapping[str, Tensor], *, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
        """Charge for the sample at its first release, and give the noisy gradient that may be used and published.

        Args:
            gradient: this rank's sum of clipped gradients.
            part: the release's number among those of the sample, from 0.
            parts: how many the sample makes at most. The noise is √parts as large, so that together they cost one.

        Raises:
            BudgetExceededError: the step would overspend the target ε. Nothing is released.
            RankLostError: another rank is gone. The step is charged, and nothing of it is used.
        """
        planned, mechanism = self.run.planned, self.mechanism
        released = release_sample(
            planned.world,
            planned.module,
            gradient,
            planned.ledger,
            planned.key,
            self.sample.step,
            self.tally.carried,
            layers=self.run.layers,
            part=part,
            parts=parts,
        )
        self.tally.carried, self.tally.noise_std = released.state, released.noise_std
        self.tally.released = of_part(mechanism, parts)
        return released.gradient


ASKED_AGAIN = 8
"""At most so many examples run once more to find the line of a write. Where that is rare, the refusal has none."""


def _remembered(
    micro_batches: MicroBatches, last: list[tuple[Any, int]], read: Callable[[], None]
) -> Iterator[tuple[Any, int]]:
    """The micro-batches as they are, the last of which stays in ``last``; ``read`` is called for each."""
    for batch, size in micro_batches:
        last[:] = [(batch, size)]
        read()
        yield batch, size


Opens = Callable[[Run, LogicalBatch, tuple[Any, ...], Tally], OpenStep]
"""What makes an :class:`OpenStep` from its four attributes."""


@dataclass(frozen=True)
class Replay:
    """What is set from outside where a run is replayed to be verified, see :mod:`lightning_dp.audit.verification`.

    Attributes:
        key: of all randomness, in the place of a fresh one.
        open_step: makes the open step of each sample.
        left_out: numbers of the examples (or users) that no step draws, as if they were not there.
        unread: dataset indices that no look reads.
    """

    key: RandomKey
    open_step: Opens
    left_out: frozenset[int] = frozenset()
    unread: frozenset[int] = frozenset()
