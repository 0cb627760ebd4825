"""dataset → Poisson draw → logical batches: the training loader under differential privacy."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp.batches.microbatch import split
from lightning_dp.batches.units import Piece, Units, counted
from lightning_dp.loading.apart import collate_each_if_needed
from lightning_dp.loading.draws import Draws
from lightning_dp.loading.examples import Drawn, Examples, as_it_is, first_of
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.loading.reading import order, record
from lightning_dp.loading.worker_init import WorkerInit
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.plan.privacy_plan import PrivacyPlan


class LogicalBatchConsumedError(RuntimeError):
    """A step's sample was about to be used a second time."""


@dataclass
class LogicalBatch:
    """One step's sample on this rank: what Lightning's loops fetch as *the* batch, up to the strategy.

    Attributes:
        step: number of the step in the run's life, from 0.
        indices: dataset indices drawn for this rank, ``(n,)``; ``n`` may be 0. Numbers of users where a user is the privacy
            unit. **Private**.
        global_size: how many examples (or users) all ranks together have in this step. **Private**.
        source: where the micro-batches come from.
    """

    step: int
    indices: Tensor
    global_size: int
    source: _MicroBatchSource

    def micro_batches(self) -> Iterator[tuple[Any, int]]:
        """Yield (collated micro-batch, number of examples, or users, in it), once.

        Raises:
            LogicalBatchConsumedError: on a second pass. Every pass would be a further release of the same sample.
        """
        return self.source.take(self.step)

    @property
    def pieces(self) -> list[Piece]:
        """Whose examples each of the micro-batches holds, in their order. **Private**."""
        return self.source.pieces(self.step)


class PoissonLoader:
    """Replaces the user's training loader: the same dataset, collate_fn and workers, but private sampling.

    Its items are :class:`LogicalBatch` objects, one for each DP step; its length, the number of steps in an epoch, is that
    of the user's loader, so that whoever counts batches counts right. Step t's sample depends on the key and t alone: all ranks
    make the same global draw and each takes its own slice of it.

    Args:
        loader: the user's loader, as Lightning has prepared it for this rank. Its shuffling and sampler play no part any
            more but in its length, and neither does ``drop_last``.
        plan: gives the sampling probability. The divisor of the step is the plan's, never a realised size.
        key: its SAMPLING stream is used.
        rank: this process's rank.
        world_size: the number of ranks.
        physical_batch_size: the most examples in a micro-batch. Changes memory and nothing else.
        next_step: says the number of the next step when an epoch begins (how many the ledger has charged).
        units: whose each example is: users are drawn in the place of examples. ``None`` if each is a unit of its own.
        row_wise: what the user vouches for, see :mod:`lightning_dp.loading.row_wise`.
        begun_at: number of the step with which the key's randomness began, see :class:`~lightning_dp.loading.draws.Draws`.

    Attributes:
        examples: reads and collates, see :class:`~lightning_dp.loading.examples.Examples`.
        form: how batches come to the engines, by which it is decided whether every example is collated by itself. To be set
            before anything is read; ``None`` collates as the user's loader does.
        waited: seconds for which the loop has waited for micro-batches so far. **Private**, as the sizes of draws are.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        plan: PrivacyPlan,
        key: RandomKey,
        *,
        rank: int,
        world_size: int,
        physical_batch_size: int,
        next_step: Callable[[], int],
        units: Units | None = None,
        row_wise: Sequence[str] = (),
        begun_at: int = 0,
    ) -> None:
        self.dataset = loader.dataset
        self.examples = Examples(loader.dataset, loader.collate_fn, row_wise)
        self.form: ExampleForm | None = None
        self._settled = False
        self._unread: frozenset[int] = frozenset()
        self.plan = plan
        self.physical_batch_size = physical_batch_size
        self.waited = 0.0
        self._epoch = len(loader)
        self._next_step = next_step
        self._source: _MicroBatchSource | None = None
        self._open: _MicroBatchSource | None = None
        self._order = order(loader.dataset) if world_size > 1 or not plan.mechanism.memoryless else ""
        self.units = units
        self._given = loader
        self._draws = Draws(loader.dataset, plan, key, rank, world_size, units, begun_at)
        self._schedule = _Schedule(self._draws, physical_batch_size, self.examples.seeded)
        self._micro_batch_loader = _rebuild(loader, self._schedule, self.examples)

    def __getattr__(self, name: str) -> Any:
        """What else the user's loader has, such as ``batch_size``, ``sampler`` and ``num_workers``: to be read, not changed."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._given, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _FIXED and "_given" in self.__dict__:
            raise ValueError(
                f"train_dataloader.{name} cannot be set: expected it to stay as it is. Return a new DataLoader."
            )
        super().__setattr__(name, value)

    def __len__(self) -> int:
        return self._epoch

    def __iter__(self) -> Iterator[LogicalBatch]:
        if self._order and order(self.dataset) != self._order:
            raise ValueError(
                f"dataset={type(self.dataset).__name__} has other indices than when its loader was made: expected them to "
                "stay: the ranks compare their data once for each loader, and where steps come in blocks, it follows from an "
                "example's index which it is in. Return a new loader, with Trainer(reload_dataloaders_every_n_epochs=1)."
            )
        self.settle()
        first = self._next_step()
        source, self._source = self._source, None
        if source is None or not source.goes_on(first, self.physical_batch_size):
            source = self._start(first)
        if self._micro_batch_loader.persistent_workers:
            self._source = source  # the next epoch goes on with it, and its first sample is being read already
        for step in range(first, first + len(self)):
            mine, global_size = self._draws.at(step)
            yield LogicalBatch(step, torch.from_numpy(mine), global_size, source)

    def _start(self, first: int) -> _MicroBatchSource:
        last = None if self._micro_batch_loader.persistent_workers else first + len(self)
        self._schedule.steps = itertools.count(first) if last is None else range(first, last)
        self._schedule.physical_batch_size = self.physical_batch_size
        self._draws.forget()
        if self._open is not None and not self._micro_batch_loader.persistent_workers:
            self._open.close()
        iterator = iter(self._micro_batch_loader)
        self._open = _MicroBatchSource(iterator, self._draws, self.physical_batch_size, first, self._note_wait)
        return self._open

    def _note_wait(self, seconds: float) -> None:
        self.waited += seconds

    def close(self) -> None:
        """End the workers. What they have read ahead is dropped: it was neither released nor charged."""
        if self._open is not None:
            self._open.close()
        self._source = self._open = self._micro_batch_loader._iterator = None

    def resize(self, physical_batch_size: int) -> None:
        """Work on at most so many examples at once from the next step on. Which examples are drawn does not change."""
        if physical_batch_size == self.physical_batch_size:
            return
        self.physical_batch_size = physical_batch_size
        reading = self._open
        if reading is not None:  # what was read ahead is read again, in pieces of the new size
            reading.go_on_as(self._start(reading.step))
            self._open = reading

    def settle(self) -> None:
        """Decide how batches are collated, once."""
        if self.form is not None and not self._settled:
            self._settled = True
            self.examples.axis = self.form.axis
            collate_each_if_needed(self.form, self)

    def first_records(self, count: int) -> list[Any]:
        """The dataset's first ``count`` examples (fewer if it is smaller), for :meth:`collated`."""
        return [record(self.dataset, int(index)) for index in self._readable[:count]]

    def first_examples(self, count: int) -> tuple[Any, int]:
        """The dataset's first ``count`` examples (fewer if it is smaller), collated as in a step: for trying an engine out.

        Of examples that are not alike, those that are.
        """
        self.settle()
        indices = self.first_indices(count)
        batch, alike = first_of(self.examples.__getitems__(Drawn(indices, indices)))
        return batch, len(indices) if alike is None else alike

    def first_indices(self, count: int) -> list[int]:
        """The indices of :meth:`first_examples`."""
        return [int(index) for index in self._readable[:count]]

    def evenly_spaced(self, count: int) -> list[Any]:
        """``count`` of the examples that the plan counts (fewer if there are), for :meth:`collated`.

        An audit's canaries come behind those: they are planted to be odd.
        """
        size = counted(self.units, len(self._readable), self.plan.dataset_size)
        return self.records([self._readable[int(place)] for place in np.linspace(0, size - 1, min(count, size))])

    def records(self, indices: Sequence[int]) -> list[Any]:
        """The examples with these indices, for :meth:`collated`."""
        return [record(self.dataset, int(index)) for index in indices]

    def scattered(self, at_once: int) -> Iterator[list[int]]:
        """The indices of all examples that the plan counts (of many, of 10⁵), in pieces from all over the dataset."""
        size = counted(self.units, len(self._readable), self.plan.dataset_size)
        places = np.unique(np.linspace(0, size - 1, min(size, 100_000)).astype(np.int64))
        for piece in split(np.random.default_rng(0).permutation(places), at_once):
            yield [int(self._readable[int(place)]) for place in piece]

    def collated(self, records: list[Any]) -> Any:
        """A batch of some of the records that :meth:`evenly_spaced` gave, as the user's loader would make it."""
        return self.examples.as_of_the_user(records)

    def leave_out(self, numbers: Collection[int], unread: Collection[int]) -> None:
        """Never draw examples (or users) with these numbers, nor look at the records ``unread``: a replay's neighbour."""
        self._draws.left_out, self._unread = sorted(numbers), frozenset(unread)
        self._draws.forget()

    @property
    def _readable(self) -> Any:
        """The indices of the examples that this rank can read."""
        indices = self.dataset.here if isinstance(self.dataset, HeldRecords) else range(len(cast(Sized, self.dataset)))
        return [index for index in indices if index not in self._unread] if self._unread else indices

    def state_dict(self) -> dict[str, Any]:
        """Nothing: where to go on is in the ledger. Its presence tells Lightning that this loader can resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing to load; see :meth:`state_dict`."""


_FIXED = (
    "dataset",
    "batch_size",
    "sampler",
    "batch_sampler",
    "drop_last",
    "collate_fn",
    "num_workers",
    "persistent_workers",
)
"""Attributes of the user's loader that are set no more; torch's loader refuses most of them too."""


class _Schedule:
    """The batch sampler of the inner loader: all micro-batches of all steps of an epoch, one after the other.

    Workers that prefetch therefore read ahead into the next logical batch. With persistent workers the steps never end,
    so that they also read ahead into the next epoch.
    """

    def __init__(self, draws: Draws, physical_batch_size: int, seeded: bool) -> None:
        self.steps: Iterable[int] = range(0)
        self.physical_batch_size = physical_batch_size
        self._draws, self._seeded = draws, seeded

    def __iter__(self) -> Iterator[Drawn]:
        for step in self.steps:
            for piece in self._draws.pieces(step, self.physical_batch_size):
                seeds, common = self._draws.seeds(step, piece.examples) if self._seeded else ([], 0)
                yield Drawn(piece.examples.tolist(), seeds, len(piece.examples) // len(piece.units), common)


class _MicroBatchSource:
    """Hands out the micro-batches of each step in turn and keeps loop and schedule in step."""

    def __init__(
        self,
        iterator: Iterator[Any],
        draws: Draws,
        physical_batch_size: int,
        first: int,
        note_wait: Callable[[float], None],
    ) -> None:
        self._iterator, self._draws, self._physical_batch_size = iterator, draws, physical_batch_size
        self._step, self._note_wait = first, note_wait
        self._unread: Iterator[tuple[Any, int]] = iter(())

    def close(self) -> None:
        """End the workers at once: an iterator that somebody still holds would keep them."""
        end = getattr(self._iterator, "_shutdown_workers", None)
        if end is not None:
            end()

    def goes_on(self, step: int, physical_batch_size: int) -> bool:
        """Whether ``step`` comes next, in pieces of that size."""
        return self._step == step and self._physical_batch_size == physical_batch_size

    @property
    def step(self) -> int:
        """The step whose examples are read next."""
        return self._step

    def go_on_as(self, other: _MicroBatchSource) -> None:
        """Read the next steps as ``other`` would, for those who hold this one."""
        self.__dict__.update(other.__dict__)

    def take(self, step: int) -> Iterator[tuple[Any, int]]:
        if step < self._step:
            raise LogicalBatchConsumedError(
                f"The sample of step {step} has been used already: expected one pass over each step's sample. Every "
                "pass releases a further noisy gradient of it. Use an optimizer that calls its closure once (not LBFGS or SAM)."
            )
        for _ in self._unread:  # what an error or an early end left of the last step
            pass
        while self._step < step:  # a batch that Lightning fetched but nobody used
            for _ in self._of_step(self._step):
                pass
            self._step += 1
        self._step += 1
        self._unread = self._of_step(step)
        return self._unread

    def pieces(self, step: int) -> list[Piece]:
        return self._draws.pieces(step, self._physical_batch_size)

    def _of_step(self, step: int) -> Iterator[tuple[Any, int]]:
        for piece in self.pieces(step):
            before = time.perf_counter()
            micro_batch = next(self._iterator)
            self._note_wait(time.perf_counter() - before)
            yield micro_batch, len(piece.units)
        self._draws.forget(before=step + 1)


def _rebuild(loader: DataLoader[Any], schedule: _Schedule, examples: Examples) -> DataLoader[Any]:
    """The user's loader with all its settings but the sampling."""
    worker_init = loader.worker_init_fn
    if worker_init is None and loader.num_workers > 0 and int(os.environ.get("PL_SEED_WORKERS", 0)):
        worker_init = pl_worker_init_function  # what Lightning does for loaders under seed_everything(workers=True)
    return DataLoader(
        examples,
        batch_sampler=schedule,  # type: ignore[arg-type]  # what it asks for is more than indices
        num_workers=loader.num_workers,
        collate_fn=as_it_is,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=WorkerInit(worker_init) if loader.num_workers else None,
        multiprocessing_context=loader.multiprocessing_context,
        generator=loader.generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=loader.persistent_workers,
    )


def check_sample(batch: object, charged: int, unused: int) -> None:
    """Refuse a batch that is not the sample that belongs to the next step.

    Args:
        batch: what Lightning passes to a step.
        charged: how many steps are charged.
        unused: how many samples were drawn and not released.

    Raises:
        LogicalBatchConsumedError: it has been released, as by an optimizer that evaluates its closure twice.
        RuntimeError: it is no sample of the private loader, or another step's.
    """
    if not isinstance(batch, LogicalBatch):
        raise RuntimeError(
            f"batch of type {type(batch).__name__}: expected a LogicalBatch. Something replaced the private training "
            "loader; pass the data to trainer.fit as usual and do not touch trainer.fit_loop."
        )
    if batch.step < charged + unused:
        raise LogicalBatchConsumedError(
            f"The sample of step {batch.step} has been used already: expected one pass over each step's sample. A second "
            "gradient of it, which optimizers such as SAM and LBFGS ask for by evaluating their closure again, is a further "
            "release, not amplified by sampling as if it had a sample of its own. Use one that calls its closure once, such as "
            "SGD or Adam."
        )
    if batch.step != charged + unused:
        raise RuntimeError(
            f"The sample of step {batch.step} arrived when {charged} steps are charged: expected one release for "
            "each sample. An override of optimizer_step or a callback left a batch unused; step on every batch."
        )
