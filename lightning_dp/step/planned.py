"""What is known about a run once its training loader is: handed to whatever looks before the first step, and to the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_dp.accounting import Ledger
from lightning_dp.batches.seeded import seeded
from lightning_dp.engines.select import Selection
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.loader import LogicalBatch, PoissonLoader
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.world import World
from lightning_dp.step.batch_hooks import BatchHooks
from lightning_dp.step.logs import StepCapture


@dataclass(frozen=True, eq=False)
class Planned:
    """A run that has a plan. Another loader makes another of these, with the same ledger and key.

    Attributes:
        module: in training, attached to its Trainer.
        world: the processes that train it.
        form: how a batch comes to the engines and back.
        loader: of Poisson-sampled logical batches.
        ledger: the steps that are charged, and the plan.
        key: of the run, the same on every rank. **Private**.
        logs: takes what training_step logs and returns.
        hooks: what hooks get for a batch, and what they change in it.
        given: the user's loader, as Lightning has prepared it.
    """

    module: pl.LightningModule
    world: World
    form: ExampleForm
    loader: PoissonLoader
    ledger: Ledger
    key: RandomKey
    logs: StepCapture
    hooks: BatchHooks
    given: DataLoader[Any]

    def micro_batches(self, batch: LogicalBatch) -> Iterator[tuple[Any, int]]:
        """The micro-batches of a step on the device, with their views, and how many examples (or units) each holds.

        They are smaller than the loader's where examples are not alike, see :mod:`lightning_dp.batches.alike`.
        """
        seed = int.from_bytes(self.key.derive(Stream.VIEWS, batch.step, size=8), "big")
        draws = self.key.seed_of_step(Stream.DROPOUT, batch.step) & 0xFFFFFFFF
        for (micro_batch, size), (_, examples) in zip(batch.micro_batches(), batch.pieces, strict=True):
            of_unit = examples.reshape(size, -1)
            each = of_unit.shape[1]

            def seeds(first: Any = of_unit[:, 0]) -> list[int]:
                found: list[int] = self.key.seeds(Stream.HOOKS, batch.step, first).tolist()
                return found

            def common() -> int:
                return self.key.seed_of_step(Stream.HOOKS, batch.step)

            of_step = self.key.seeds(Stream.DROPOUT, batch.step, of_unit[:, 0])
            for alike in self.form.groups(micro_batch, size, each, seeds, common):
                of_group = of_unit[alike.places].reshape(-1)
                rows = self.form.with_views(alike.batch, of_group, seed)
                yield (
                    seeded(self.form.in_units(rows, len(alike.places), each), of_step[alike.places], draws),
                    len(alike.places),
                )


@dataclass(frozen=True, eq=False)
class Run:
    """A run that was looked at: what its steps need. Thawed parameters, or another loader, make another of these.

    Attributes:
        planned: what was known before.
        selection: the engine; under manual optimization that of the first private step.
        layers: what keeps parameters in shards, if they are brought together layer by layer.
        trainable: the names of the parameters that are trained.
        static_shapes: whether every micro-batch is padded to the physical batch size.
        log_train_metrics: whether what training_step logs reaches the loggers.
    """

    planned: Planned
    selection: Selection
    layers: Layerwise | None
    trainable: frozenset[str]
    static_shapes: bool
    log_train_metrics: bool

    @property
    def pad_to(self) -> int | None:
        """How many rows every micro-batch gets; ``None`` for as many as it has."""
        return self.planned.loader.physical_batch_size if self.static_shapes else None
