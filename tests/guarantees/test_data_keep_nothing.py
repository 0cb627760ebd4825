"""What is made of an example follows from the example: data sets, transforms and collate_fn carry nothing from read to read."""

from __future__ import annotations

import os
from collections import deque
from functools import lru_cache
from io import BytesIO
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, default_collate

from lightning_dp import DifferentialPrivacy
from lightning_dp.errors import PreflightError
from tests.conftest import Notes, Regressor, loader, regression_data, trainer

HERE = r"test_data_keep_nothing\.py"
ROWS = regression_data()
TOTALS = {"all": 0.0}
LARGE = np.zeros(20_000)


class Keeps(Dataset[Any]):
    """Sixty-four rows; what is made of each is a case's own."""

    def __init__(self) -> None:
        self.count, self.mean, self.label = 0, 0.0, ""
        self.last: Any = None
        self.file: Any = None
        self.owner: Any = None
        self.held: dict[Any, Any] = {}
        self.queue: deque[Any] = deque(maxlen=3)
        self.history: list[float] = []
        self.images: list[Any] = [None] * len(ROWS)
        self.tensor, self.array, self.flags = torch.zeros(4), np.zeros(4), np.zeros(len(ROWS))

    def __len__(self) -> int:
        return len(ROWS)

    def __getitem__(self, index: int) -> Any:
        inputs, target = ROWS[index]
        return self.made(index, inputs), target

    def made(self, index: int, inputs: Tensor) -> Tensor:
        raise NotImplementedError  # of each case


class RunningMean(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * float(inputs.mean())
        return inputs - self.mean


class EveryTenth(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.count += 1
        return inputs * (self.count % 10 > 0)


class WithTheLast(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        before, self.last = self.last, inputs
        return inputs if before is None else (inputs + before) / 2


class FromTheFirst(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        if self.last is None:
            self.last = inputs
        return inputs - self.last


class FirstOfItsClass(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        return inputs - self.held.setdefault(bool(inputs[0] > 0), inputs)


class CountOfItsClass(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        kind = bool(inputs[0] > 0)
        self.held[kind] = self.held.get(kind, 0) + 1
        return inputs / self.held[kind]


class Queue(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.queue.append(inputs)
        return torch.stack(list(self.queue)).mean(0)


class History(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.history.append(float(inputs.mean()))
        return inputs - sum(self.history) / len(self.history)


class MeanInATensor(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.tensor.data.mul_(0.9).add_(inputs, alpha=0.1)
        return inputs - self.tensor


class MeanInAnArray(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.array += inputs.numpy()
        return inputs - torch.from_numpy(self.array).float()


class MeanInALargeArray(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        np.add(LARGE, float(inputs.mean()), out=LARGE)
        return inputs + float(LARGE[0])


class Global(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        TOTALS["all"] += float(inputs.mean())
        return inputs - TOTALS["all"]


class OfItsClassBody(Keeps):
    total = 0.0

    def made(self, index: int, inputs: Tensor) -> Tensor:
        OfItsClassBody.total += float(inputs.mean())
        return inputs - OfItsClassBody.total


class Transform:
    def __init__(self) -> None:
        self.mean = 0.0

    def __call__(self, inputs: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * float(inputs.mean())
        return inputs - self.mean


class ByATransform(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.transform = Transform()

    def made(self, index: int, inputs: Tensor) -> Tensor:
        return self.transform(inputs)


class Ends(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        if index % 4 == 1:
            raise StopIteration
        return inputs


CARRIES = {
    RunningMean: "mean",
    EveryTenth: "count",
    WithTheLast: "last",
    FromTheFirst: "last",
    FirstOfItsClass: "held",
    CountOfItsClass: "held",
    Queue: "queue",
    History: "history",
    MeanInATensor: "tensor",
    MeanInAnArray: "array",
    MeanInALargeArray: "LARGE",
    Global: "all",
    OfItsClassBody: "total",
    ByATransform: "mean",
}


def train(data: Any, *, steps: int = 2, **options: Any) -> DifferentialPrivacy:
    private = DifferentialPrivacy(noise_multiplier=1.0, **options.pop("private", {}))
    trainer(private, max_steps=steps).fit(Regressor(), loader(data, **options))
    return private


@pytest.mark.parametrize(("case", "what"), CARRIES.items())
def test_what_reaches_other_examples_is_refused_with_the_line(case: type[Keeps], what: str) -> None:
    with pytest.raises(PreflightError, match=rf"reading an example changes .*{what}.*\(.*{HERE}:\d+ in "):
        train(case())
    with pytest.raises(PreflightError, match=what):
        train(Subset(case(), range(8, 64)))


class Later:
    """Begins to keep what it sees when no look sees it any more."""

    def __init__(self, kind: type[Keeps]) -> None:
        self.data, self.reads = kind(), 0

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.data[index] if torch.utils.data.get_worker_info() or fitting else ROWS[index]


fitting: list[int] = []


class Begins(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        fitting.append(1)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_is_refused_at_the_read_that_does_it(workers: int) -> None:
    fitting.clear()
    private = DifferentialPrivacy(noise_multiplier=1.0)
    try:
        with pytest.raises(PreflightError, match=r"reading an example changes RunningMean\.mean \("):
            trainer(private, Begins(), max_steps=3).fit(Regressor(), loader(Later(RunningMean), num_workers=workers))
    finally:
        fitting.clear()
    assert private.ledger is not None
    assert private.ledger.steps == (0 if workers else 1)


class Counts(Keeps):
    """For a print-out: nothing that reads an example asks for it."""

    def made(self, index: int, inputs: Tensor) -> Tensor:
        self.count += 1
        return inputs

    def report(self) -> str:
        return f"{self.count} reads"


class Caches(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        if index not in self.held:
            self.held[index] = inputs
        self.images[index] = self.flags[index] = index
        return self.held[index]


class CachesByName(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        return self.held.setdefault(f"{index}.png", inputs)


class ForgetsWhatIsOld(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        found = self.held.pop(index, None)
        self.held[index] = inputs if found is None else found
        if len(self.held) > 5:
            del self.held[next(iter(self.held))]
        return inputs


class OpensWhenAsked(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        if self.owner != os.getpid():  # a file is of one process
            self.owner, self.file = os.getpid(), BytesIO(bytes(100))
        self.file.seek(index)
        self.file.read(1)
        return inputs


class BuildsWhenAsked(Keeps):
    def made(self, index: int, inputs: Tensor) -> Tensor:
        if self.last is None:
            self.last = {place: place for place in range(len(self))}
            self.history.extend([0.5, 0.5])
            self.count = len(self.last)
        return inputs * self.history[0] * self.count


class Remembers(Keeps):
    @lru_cache(maxsize=8)  # noqa: B019 (as people write it)
    def decoded(self, index: int) -> Tensor:
        return ROWS[index][0]

    def made(self, index: int, inputs: Tensor) -> Tensor:
        return self.decoded(index)


class Draws(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = np.random.default_rng(0)

    def made(self, index: int, inputs: Tensor) -> Tensor:
        return inputs + torch.rand(4) + float(self.numbers.random())


@pytest.mark.parametrize(
    "case", [Counts, Caches, CachesByName, ForgetsWhatIsOld, OpensWhenAsked, BuildsWhenAsked, Remembers, Draws]
)
def test_caches_files_and_counts_are_ordinary(case: type[Keeps]) -> None:
    assert train(case(), steps=6).plan is not None
    if case in (Caches, OpensWhenAsked):
        train(case(), num_workers=1)


def test_a_cache_serves_what_was_put_into_it() -> None:
    data = Caches()
    train(data, steps=6)
    assert data.held
    assert all(torch.equal(value, ROWS[index][0]) for index, value in data.held.items())


def test_who_vouches_for_reads_is_taken_at_his_word_and_the_statement_says_so() -> None:
    private = train(EveryTenth(), private={"row_wise": ["__getitem__"]})
    assert any("vouches for __getitem__" in caveat for caveat in private.statement().caveats)


def test_a_collate_function_carries_nothing_either() -> None:
    seen = {"mean": 0.0}

    def collate(rows: list[Any]) -> Any:
        batch = default_collate(rows)
        seen["mean"] = 0.9 * seen["mean"] + 0.1 * float(batch[0].mean())
        return [batch[0] - seen["mean"], batch[1]]

    with pytest.raises(PreflightError, match=rf"reading an example changes .*'mean'.*{HERE}"):
        train(ROWS, collate_fn=collate)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_read_does_not_end_the_run(workers: int) -> None:
    with pytest.raises(PreflightError, match=rf"dataset=Ends raised StopIteration .*{HERE}"):
        train(Ends(), num_workers=workers)


class Hooks(Regressor):
    """Keeps what it sees in a transfer hook, from its second step on."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.global_step < 1:
            return batch
        seen.append(self.mean)
        self.mean = self.mean + float(batch[0].mean())
        return batch


class Ending(Regressor):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        raise StopIteration


class Module(L.LightningDataModule):
    """Does the same in a data module."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = 0.0

    def train_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        fit: Any = self.trainer
        if fit.global_step >= 1:
            self.mean = self.mean + float(batch[0].mean())
        return batch


seen = Notes()


def test_transfer_hooks_find_nothing_of_other_examples() -> None:
    seen.clear()
    module = Hooks()
    with pytest.warns(UserWarning, match="a batch transfer hook changes self.mean: put back"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(module, loader())
    assert set(seen) == {0.0}
    assert module.mean == 0.0
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3)
    with pytest.raises(PreflightError, match=rf"a batch transfer hook sets the data module's mean \(.*{HERE}"):
        fit.fit(Regressor(), datamodule=Module())
    with pytest.raises(PreflightError, match=rf"a batch transfer hook raised StopIteration .*{HERE}"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(Ending(), loader())
