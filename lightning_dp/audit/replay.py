"""One replay: a copy of the user's Trainer, module and data, trained for a few steps on a small data set."""

from __future__ import annotations

import copy
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    Timer,
)
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from lightning_dp.audit.neighbour import Choice, ChosenRecords, Neighbour, choose
from lightning_dp.audit.recording import Recording
from lightning_dp.batches.units import Units
from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.lightning_internals import either, own, root_of, write_into
from lightning_dp.loading.columns import with_batch_size
from lightning_dp.loading.like import loader_like
from lightning_dp.loading.privacy_unit import unit_from
from lightning_dp.look.loader import check_loader
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.plan.correlation import INDEPENDENT
from lightning_dp.record.account import Account
from lightning_dp.step.open_step import Replay

LEFT_OUT = (Checkpoint, DeviceStatsMonitor, EarlyStopping, LearningRateMonitor, ModelSummary, ProgressBar, Timer)
"""Lightning's callbacks that show, write or stop, and take no part in a step."""

BATCHES = 2
"""Steps in an epoch of a replay, so that hooks at the end of an epoch run too."""

_QUIET = ("lightning.pytorch", "lightning.fabric", "pytorch_lightning", "lightning_fabric", "lightning")


class NotCopiedError(ValueError):
    """Trainer, module or data cannot be copied."""


@dataclass
class Replays:
    """Makes replays of one run.

    Args:
        trainer: the user's, with its callbacks. Left as it is.
        module: likewise.
        data: a loader, a data module, or ``None`` if the module has its own.
        steps: how many are taken.
        examples: how many records are chosen.
        remove: dataset index of the one to be taken away, ``None`` to choose.
        seed: of all random numbers.

    Attributes:
        choice: which records; ``None`` before the first replay.
        owners: the user that each chosen record is of, where users are the unit of privacy.
    """

    trainer: pl.Trainer
    module: pl.LightningModule
    data: DataLoader[Any] | pl.LightningDataModule | None
    steps: int
    examples: int
    remove: int | None
    seed: int
    choice: Choice | None = None
    owners: list[int] | None = None
    last: ChosenRecords | None = None
    collate: Any = None

    def run(self, neighbour: Neighbour | None, *, double: bool, given: Recording | None = None) -> Recording:
        """Train once.

        Args:
            neighbour: on which data; ``None`` for the chosen records themselves.
            double: whether to compute in double precision rather than in the Trainer's.
            given: the run whose releases are given to this one.

        Raises:
            NotCopiedError: the user's objects cannot be copied.
            PreflightError: training cannot be private as it is set up.
            Exception: what the user's code raises.
        """
        trainer, module, data = self._copies()
        recording = Recording(given)
        private = private_of(trainer)
        with tempfile.TemporaryDirectory() as scratch, _quietly(), isolate_rng(), torch.random.fork_rng():
            _arrange(trainer, self.steps, scratch, double=double)
            loader = None
            if isinstance(data, DataLoader):
                loader = self._chosen(data, neighbour, private, recording)
            else:
                owner = module if data is None else data
                original = owner.train_dataloader
                owner.train_dataloader = lambda: self._chosen(original(), neighbour, private, recording)
            random.seed(self.seed)
            np.random.seed(self.seed)  # noqa: NPY002 (the generator that old code draws from)
            seed_torch(self.seed)
            datamodule = None if isinstance(data, DataLoader) else data
            trainer.fit(module, train_dataloaders=loader, datamodule=datamodule)
            recording.end(trainer, module)
        if given is None and not recording.steps:
            raise ValueError("no private step in a replay: expected training to take some. Check the Trainer's limits.")
        return recording

    def _copies(self) -> tuple[Any, Any, Any]:
        loggers = self.trainer.loggers
        self.trainer.loggers = []
        try:
            return copy.deepcopy((self.trainer, self.module, self.data))
        except Exception as error:
            raise NotCopiedError(
                f"Trainer, module or data cannot be copied ({type(error).__name__}: {error}): expected objects that "
                "copy.deepcopy can copy, since every replay starts from the same. Give verify() a Trainer and a module that "
                "were not trained yet, and open files, locks and connections in setup() rather than in __init__."
            ) from error
        finally:
            self.trainer.loggers = loggers

    def _chosen(
        self, loader: Any, neighbour: Neighbour | None, private: DifferentialPrivacy, recording: Recording
    ) -> DataLoader[Any]:
        loader = check_loader(with_batch_size(loader))
        if self.choice is None:
            self.choice = choose(loader.dataset, self.examples, self.remove)
            if private.privacy_unit is not None:
                self.owners = _owners(private.privacy_unit.read(loader.dataset), self.choice.indices)
        neighbour = neighbour or Neighbour("the same data")
        unread = self._places_of(neighbour.absent)
        self.last = ChosenRecords(loader.dataset, self.choice.indices, neighbour, unread)
        self.collate = loader.collate_fn
        numbers = len(self.choice.indices) if self.owners is None else len(set(self.owners))
        if self.owners is not None:
            assert private.privacy_unit is not None
            private.privacy_unit = unit_from(self.owners, private.privacy_unit.most, static_shapes=False)
        private.dataset_size = private.expected_batch_size = 2 * numbers
        if private.noise != INDEPENDENT:  # every record takes part whenever it is its group's turn
            private.noise_bands = min(private.noise_bands, self.steps)
            private.dataset_size *= private.noise_bands if private.noise == "banded" else 2
        left_out = frozenset() if neighbour.absent is None else frozenset({self.number(neighbour.absent)})
        private.replay = Replay(RandomKey.from_seed(self.seed), recording.open_step, left_out, unread)
        return loader_like(loader, self.last, BATCHES)

    def number(self, place: int) -> int:
        """The number by which steps draw a chosen record: its place, or its user."""
        return place if self.owners is None else self.owners[place]

    def index_of(self, number: int) -> str:
        """How a number that steps draw is called in a report."""
        assert self.choice is not None
        if self.owners is None:
            return f"example {self.choice.indices[number]}"
        return f"the user of example {self.choice.indices[self.owners.index(number)]}"

    def _places_of(self, place: int | None) -> frozenset[int]:
        if place is None:
            return frozenset()
        if self.owners is None:
            return frozenset({place})
        return frozenset(at for at, owner in enumerate(self.owners) if owner == self.owners[place])


def private_of(trainer: pl.Trainer) -> DifferentialPrivacy:
    """The Trainer's DifferentialPrivacy.

    Raises:
        ValueError: it has none.
    """
    for one in trainer.callbacks:  # type: ignore[attr-defined]  # set where type checkers do not see it
        if isinstance(one, DifferentialPrivacy):
            return one
    raise ValueError(
        "no DifferentialPrivacy among the Trainer's callbacks: expected one, whose steps are to be verified. Add it."
    )


def _owners(units: Units, indices: list[int]) -> list[int]:
    """The users of these records, numbered from 0 in the order in which they come."""
    of_each = {int(index): unit for unit in range(len(units)) for index in units.examples_of(unit)}
    numbers: dict[int, int] = {}
    return [numbers.setdefault(of_each[index], len(numbers)) for index in indices]


def _arrange(trainer: Any, steps: int, scratch: str, *, double: bool) -> None:
    """Set a copy of a Trainer to train a few steps and nothing else."""
    private = private_of(trainer)
    private.noise_multiplier = 1.0 if private.noise_multiplier is None else private.noise_multiplier
    private.epsilon, private.max_batch_size, private.simulate = None, None, 1
    private.physical_batch_size = private.physical_batch_size if isinstance(private.physical_batch_size, int) else None
    private._account = Account()
    left_out = tuple(kind for stock in LEFT_OUT for kind in either(stock))
    trainer.callbacks = [one for one in trainer.callbacks if not isinstance(one, left_out)]
    trainer.loggers = [own(root_of(trainer), DummyLogger)()]
    trainer.fit_loop.epoch_loop.max_steps, trainer.fit_loop.epoch_loop.min_steps = steps, None
    trainer.fit_loop.max_epochs, trainer.fit_loop.min_epochs = steps, None  # an end, even if no epoch takes a step
    trainer.limit_train_batches, trainer.limit_val_batches, trainer.num_sanity_val_steps = 1.0, 0, 0
    trainer.should_stop = False
    write_into(trainer, scratch)
    if double:
        trainer.strategy.precision_plugin = own(root_of(trainer), DoublePrecision)()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without Lightning's announcements and hints, which are about the run that is to come."""
    told = [logging.getLogger(name) for name in _QUIET]
    before = [one.level for one in told]
    for one in told:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(told, before, strict=True):
            one.setLevel(level)
