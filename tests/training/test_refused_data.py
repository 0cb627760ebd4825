"""Data that cannot be sampled or kept apart get an error that names value, expectation and remedy, before any batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_dp import DifferentialPrivacy, EngineError, PreflightError
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights
from tests.training.refusals import NeverStepped, refused


class _Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter([])


class _Batches(BatchSampler):
    pass


class _OwnIteration(DataLoader):
    def __iter__(self) -> Any:
        return super().__iter__()


class _NoLength(torch.utils.data.Dataset):
    def __getitem__(self, index: int) -> Any:
        return index


DATA = regression_data()
LOADERS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "weighted": (
        lambda: loader(sampler=WeightedRandomSampler([1.0] * 64, 64)),
        ["WeightedRandomSampler", "same probability"],
    ),
    "subset": (
        lambda: loader(sampler=SubsetRandomSampler(range(32))),
        ["SubsetRandomSampler", r"torch.utils.data.Subset(dataset, indices)"],
    ),
    "replacement": (
        lambda: loader(sampler=RandomSampler(DATA, replacement=True)),
        ["RandomSampler", "replacement=True"],
    ),
    "fewer": (
        lambda: loader(sampler=RandomSampler(DATA, num_samples=10)),
        ["num_samples=10", "Subset", "limit_train_batches"],
    ),
    "batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=_Batches(SequentialSampler(DATA), 4, False)),
        ["_Batches", "batch_size"],
    ),
    "plain batch sampler": (
        lambda: DataLoader(DATA, batch_sampler=BatchSampler(WeightedRandomSampler([1.0] * 64, 64), 4, False)),
        ["WeightedRandomSampler"],
    ),
    "no batching": (lambda: DataLoader(DATA, batch_size=None), ["batch_size=None"]),
    "stream": (lambda: DataLoader(_Stream(), batch_size=4), ["IterableDataset", "map-style"]),
    "no length": (lambda: DataLoader(_NoLength(), sampler=range(4), batch_size=2), ["no length"]),
    "own iteration": (lambda: _OwnIteration(DATA, batch_size=4), ["_OwnIteration"]),
    "list": (lambda: [(torch.zeros(2, 4), torch.zeros(2))], ["several", "list"]),
    "dict of loaders": (lambda: {"a": loader(), "b": loader()}, ["several training loaders", "ConcatDataset"]),
    "list of loaders": (lambda: [loader(), loader()], ["several training loaders"]),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders_that_poisson_sampling_cannot_replace(name: str) -> None:
    make, words = LOADERS[name]
    if name == "list":
        words = ["type Tensor"]  # Lightning takes a list for a list of loaders
    refused(PreflightError, *words, data=make())


def test_a_custom_sampler_under_ddp_is_found_inside_lightnings_wrapper() -> None:
    from lightning.fabric.utilities.distributed import DistributedSamplerWrapper

    from lightning_dp.look.loader import check_loader

    wrapped = DistributedSamplerWrapper(WeightedRandomSampler([1.0] * 64, 64), num_replicas=2, rank=0)
    with pytest.raises(PreflightError, match="WeightedRandomSampler"):
        check_loader(loader(sampler=wrapped))


def test_a_batch_larger_than_the_data() -> None:
    refused(ValueError, "batch_size=100 with 64 examples", "expected_batch_size=64", data=loader(batch_size=100))


def test_an_epsilon_without_an_end() -> None:
    refused(
        PreflightError,
        "epsilon=3.0",
        "max_steps",
        private={"epsilon": 3.0},
        max_steps=-1,
        max_time="00:00:01:00",
    )


def test_an_epsilon_out_of_reach() -> None:
    refused(ValueError, "epsilon=1e-07", private={"epsilon": 1e-7, "delta": 1e-12}, max_steps=10**6)


def test_a_delta_that_protects_nobody_is_warned_about() -> None:
    with pytest.warns(UserWarning, match=r"delta=0.1 with dataset_size=64"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, delta=0.1), max_steps=1).fit(regressor(), loader())


def test_an_engine_asked_for_by_name_that_cannot_trace() -> None:
    class Branching(NeverStepped):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * float(np.sign(batch[0].numpy()).sum())

    refused_module = Branching()
    with pytest.raises(EngineError, match=r"engine='vmap' cannot run .*NumPy.* in training_step\).*engine='auto'"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, engine="vmap")).fit(refused_module, loader())


def test_a_batch_without_a_row_for_each_example() -> None:
    def transposed(rows: list[Any]) -> Any:
        return torch.stack([row[0] for row in rows], dim=1), torch.stack([row[1] for row in rows])

    refused(ValueError, "batch[0]", "(4, 2)", data=loader(collate_fn=transposed))


class _MixUp(NeverStepped):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        order = torch.randperm(len(batch[0]))
        return 0.7 * batch[0] + 0.3 * batch[0][order], batch[1]


class _Standardised(NeverStepped):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - batch[0].mean(0), batch[1]


@pytest.mark.parametrize("module", [_MixUp(), _Standardised()])
def test_a_batch_transform_that_mixes_examples(module: L.LightningModule) -> None:
    refused(PreflightError, "mixes examples", "batch[0]", module=module)


def test_a_random_transform_of_each_example_alone_is_fine() -> None:
    class Jittered(Regressor):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]

    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(Jittered(), loader())


def test_a_loader_inside_a_dict() -> None:
    refused(PreflightError, "nested in a dict", data={"only": loader()})


def test_a_training_step_without_batch_idx() -> None:
    class Short(Regressor):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch, 0)

    module = Short()
    before = weights(module).clone()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    assert not torch.equal(before, weights(module))
