"""Loaders in other shapes than DataLoader(dataset of examples, batch_size): they train alike, or are told what to give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.loading.loader import LogicalBatchConsumedError
from lightning_dp.look.leaks import collation
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights

DATA = regression_data()


class ByName(Regressor):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return torch.nn.functional.mse_loss(self.net(batch["x"]).squeeze(-1), batch["y"])


def by_name(seed: int = 0) -> ByName:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ByName()


def trained(module: L.LightningModule, data: Any, **arguments: Any) -> Tensor:
    private = DifferentialPrivacy(noise_multiplier=0.5, delta=1e-4, seed=3, **arguments)
    trainer(private, max_steps=4).fit(module, data)
    assert private.ledger is not None
    assert private.ledger.steps == 4
    return weights(module).detach()


def refused(
    error: type[Exception], text: str, data: Any, module: L.LightningModule | None = None, steps: int = 0
) -> None:
    """Ends so, and nothing more is charged."""
    private = DifferentialPrivacy(noise_multiplier=0.5, delta=1e-4)
    with pytest.raises(error, match=text):
        trainer(private, max_steps=40).fit(module or regressor(), data)
    assert (0 if private.ledger is None else private.ledger.steps) == steps


class Columns(Dataset[Any]):
    """Only ``__getitems__``, which returns columns."""

    def __len__(self) -> int:
        return 64

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": DATA.tensors[0][indices], "y": DATA.tensors[1][indices]}


class Rows(Columns):
    """Only ``__getitems__``, which returns a list of examples."""

    def __getitems__(self, indices: list[int]) -> Any:
        return [{"x": DATA.tensors[0][index], "y": DATA.tensors[1][index]} for index in indices]


class Listed(Columns):
    """``dataset[[3, 5]]`` are columns, as in many libraries of tables."""

    __getitems__ = None

    def __getitem__(self, indices: Any) -> Any:
        return {"x": DATA.tensors[0][indices].numpy(), "y": DATA.tensors[1][indices].numpy()}


class Centred(Columns):
    """Columns in which the examples of a batch are mixed."""

    def __getitems__(self, indices: list[int]) -> Any:
        return {"x": DATA.tensors[0][indices] - DATA.tensors[0][indices].mean(0), "y": DATA.tensors[1][indices]}


def as_it_is(batch: Any) -> Any:
    return batch


def batches_of(dataset: Any, drop_last: bool = False, sampler: Any = None) -> DataLoader[Any]:
    order = RandomSampler(dataset) if sampler is None else sampler
    return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, 16, drop_last))


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "columns": lambda: DataLoader(Columns(), batch_size=16, shuffle=True, collate_fn=as_it_is),
    "columns of a part": lambda: DataLoader(Subset(Columns(), range(64)), batch_size=16, collate_fn=as_it_is),
    "rows": lambda: DataLoader(Rows(), batch_size=16),
    "lists of indices": lambda: batches_of(Listed()),
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_dataset_that_fetches_several_examples_at_once_trains_as_one_that_does_not(name: str) -> None:
    expected = trained(by_name(), DataLoader(Rows().__getitems__(list(range(64))), batch_size=16))
    for arguments in ({}, {"physical_batch_size": 3}, {"engine": "loop"}):
        found = trained(by_name(), LOADERS[name](), **arguments)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the order of additions differs


def test_columns_say_whose_their_rows_are_too() -> None:
    of_field = trained(by_name(), DataLoader(Users(), batch_size=16, collate_fn=as_it_is), privacy_unit="user")
    users = [index % 32 for index in range(64)]
    of_list = trained(by_name(), DataLoader(Columns(), batch_size=16, collate_fn=as_it_is), privacy_unit=users)
    torch.testing.assert_close(of_field, of_list, rtol=1e-5, atol=1e-6)


class Users(Columns):
    def __getitems__(self, indices: list[int]) -> Any:
        return {**super().__getitems__(indices), "user": torch.tensor(indices) % 32}


def test_columns_that_mix_examples_are_refused() -> None:
    refused(PreflightError, "mixes examples", DataLoader(Centred(), batch_size=16, collate_fn=as_it_is), by_name())


@pytest.mark.parametrize(("drop_last", "batches"), [(False, 4), (True, 4)])
def test_an_epoch_of_lists_of_indices_is_as_long_as_their_sampler(drop_last: bool, batches: int) -> None:
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4), max_steps=-1, max_epochs=1)
    fit.fit(by_name(), batches_of(Listed(), drop_last))
    assert fit.global_step == batches
    assert fit.train_dataloader.batch_size == 16


def whole_batches() -> list[Any]:
    return [tuple(part[start : start + 8] for part in DATA.tensors) for start in range(0, 64, 8)]


SAMPLERS: dict[str, tuple[Callable[[], Any], str]] = {
    "whole batches": (
        lambda: DataLoader(whole_batches(), batch_size=None),
        r"batch_size=None over list: expected single examples .*TensorDataset\(\*map\(torch.cat, zip\(\*dataset\)\)\)",
    ),
    "a part": (
        lambda: loader(sampler=SubsetRandomSampler(range(32))),
        r"SubsetRandomSampler .*validation.*torch.utils.data.Subset\(dataset, indices\)",
    ),
    "a part, in batches": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(SubsetRandomSampler(range(32)), 8, False)),
        r"Subset\(dataset, indices\)",
    ),
    "a part, in lists": (
        lambda: batches_of(DATA, sampler=SubsetRandomSampler(range(32))),
        r"Subset\(dataset, indices\)",
    ),
    "a part of one's own": (
        lambda: loader(sampler=range(0, 64, 2)),
        r"sampler=range over a part .*Subset\(dataset, indices\)",
    ),
    "fewer": (
        lambda: loader(sampler=RandomSampler(DATA, num_samples=10)),
        r"num_samples=10\): .*Subset.*limit_train_batches",
    ),
    "weights": (lambda: loader(sampler=WeightedRandomSampler([1.0] * 64, 10)), "weight their losses"),
    "in batches": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 8, True)),
        r"BatchSampler\(SequentialSampler\): .*DataLoader\(dataset, batch_size=8, drop_last=True\)",
    ),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_poisson_sampling_would_replace_is_refused_with_what_to_give_instead(name: str) -> None:
    make, text = SAMPLERS[name]
    refused(PreflightError, text, make())


def test_the_remedies_train() -> None:
    for remedy in (
        DataLoader(TensorDataset(*map(torch.cat, zip(*whole_batches(), strict=True))), batch_size=8),
        DataLoader(Subset(DATA, list(SubsetRandomSampler(range(32)))), batch_size=8, shuffle=True),
        DataLoader(DATA, batch_size=8, drop_last=True),
    ):
        trained(regressor(), remedy)
    trained(by_name(), loader(collate_fn=with_a_number), batch_axis={"t": None})


def with_a_number(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "y": y, "t": x.abs().max()}


class OwnNumbers:
    """Draws from a generator that somebody has written in Python, which nothing knows for one."""

    def __init__(self) -> None:
        self.state = 42

    def __call__(self, rows: list[Any]) -> Any:
        self.state = self.state * 1103515245 % 2**31
        x, y = default_collate(rows)
        return x * (self.state / 2**31), y


def seeded_anew(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x * (torch.rand(x.shape, generator=torch.Generator().manual_seed(42)) < 0.8), y


def numbered(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return {"x": x, "y": y, "place": torch.arange(len(x))}


def masked(rows: list[Any]) -> Any:
    x, y = default_collate(rows)
    return x * (torch.rand(x.shape) < 0.8), y


def without_none(rows: list[Any]) -> Any:
    return default_collate([row for row in rows if row is not None])


def low_only(rows: list[Any]) -> Any:
    return default_collate([row for row in rows if float(row[1]) < 0.5])


def an_even_number(rows: list[Any]) -> Any:
    return default_collate(rows[: max(1, len(rows) // 2 * 2)])


def with_none_at(*places: int) -> list[Any]:
    return [None if index in places else DATA[index] for index in range(64)]


COLLATES: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a generator of its own": (
        lambda: loader(collate_fn=OwnNumbers()),
        PreflightError,
        "reading an example changes OwnNumbers.state",
    ),
    "a seed in each call": (lambda: loader(collate_fn=seeded_anew), PreflightError, "seeded in every call"),
    "a number of the row": (lambda: loader(collate_fn=numbered), PreflightError, "number of the row"),
    "None is left out": (
        lambda: loader(with_none_at(37), collate_fn=without_none),
        PreflightError,
        r"no row for dataset\[37\]: .*Subset",
    ),
    "the first are left out": (
        lambda: loader(with_none_at(0, 1), collate_fn=without_none),
        PreflightError,
        "no row for dataset",
    ),
    "by content": (lambda: loader(collate_fn=low_only), PreflightError, "no row for dataset"),
    "to an even number": (
        lambda: loader(batch_size=15, collate_fn=an_even_number),
        PreflightError,
        r"\d+ rows for \d+ examples",
    ),
    "a single number": (
        lambda: loader(collate_fn=with_a_number),
        BatchAxisError,
        r"batch\['t'\] has shape \(\): .*single number.*batch_axis=\{'t': None\}",
    ),
}


@pytest.mark.parametrize("name", COLLATES)
def test_a_collate_fn_is_refused_for_the_reason_that_it_gives(name: str) -> None:
    make, error, text = COLLATES[name]
    refused(error, text, make(), by_name() if name in ("a number of the row", "a single number") else None)


def test_a_collate_fn_that_draws_from_the_global_generators_trains() -> None:
    trained(regressor(), loader(collate_fn=masked))


def test_an_example_that_is_left_out_and_was_never_looked_at_is_told_when_it_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(collation, "LOOK", -1.0)  # one piece of three examples, and no more
    private = DifferentialPrivacy(noise_multiplier=0.5, delta=1e-4, physical_batch_size=3)
    data = loader(with_none_at(37), collate_fn=without_none)
    with pytest.raises((PreflightError, BatchAxisError), match="expected a row for each"):
        trainer(private, max_steps=40).fit(regressor(), data)


class Perturbed(torch.optim.SGD):
    """Sharpness-aware minimisation, by two calls of one's own or by one closure."""

    def first_step(self) -> None: ...

    def second_step(self) -> None: ...


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "error", "text", "steps"),
    [
        (Perturbed, PreflightError, r"optimizer=Perturbed, .*two halves .*second gradient", 0),
        (
            Twice,
            LogicalBatchConsumedError,
            r"sample of step 0 has been used already: .*SAM and LBFGS .*closure once",
            1,
        ),
    ],
)
def test_an_optimizer_that_needs_two_gradients_a_step_is_told_why_not(
    optimizer: Any, error: type[Exception], text: str, steps: int
) -> None:
    class Module(Regressor):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            made: torch.optim.Optimizer = optimizer(self.parameters(), lr=0.1)
            return made

    refused(error, text, loader(), Module(), steps)


def test_callbacks_and_modules_read_what_the_loader_is() -> None:
    given = loader(shuffle=True, drop_last=True, timeout=0, collate_fn=masked)
    read: dict[str, Any] = {}

    class Reads(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            found: Any = trainer.train_dataloader
            read.update({name: getattr(found, name) for name in NAMES})
            with pytest.raises(ValueError, match="cannot be set"):
                found.batch_size = 3
            assert not hasattr(found, "no_such_thing")

    trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4), Reads(), max_steps=1).fit(regressor(), given)
    assert read == {name: getattr(given, name) for name in NAMES}


NAMES = (
    "batch_size", "dataset", "num_workers", "collate_fn", "sampler", "drop_last", "batch_sampler", "pin_memory", "timeout",
    "generator", "prefetch_factor", "persistent_workers", "multiprocessing_context", "worker_init_fn",
)  # fmt: skip
