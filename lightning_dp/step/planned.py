"""What is known about a run once its training loader is: handed to whatever looks before the first step, and to the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from lightning_dp.accounting import Ledger
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.loader import LogicalBatch, PoissonLoader
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.ranks.world import World


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
    """

    module: pl.LightningModule
    world: World
    form: ExampleForm
    loader: PoissonLoader
    ledger: Ledger
    key: RandomKey

    def micro_batches(self, batch: LogicalBatch) -> Iterator[tuple[Any, int]]:
        """The micro-batches of a step on the device, with their views, and how many examples (or units) each holds."""
        seed = int.from_bytes(self.key.derive(Stream.VIEWS, batch.step, size=8), "big")
        for (micro_batch, size), (_, examples) in zip(batch.micro_batches(), batch.pieces, strict=True):
            rows = self.form.to_engine(micro_batch, len(examples))
            rows = self.form.with_views(rows, examples, seed)
            yield self.form.in_units(rows, size, len(examples) // size), size
