"""Loaders with ``batch_size=None`` whose sampler gives lists of indices: the dataset itself returns the batch, as columns."""

from __future__ import annotations

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, Dataset

from lightning_dp.lightning_internals import sampler_within
from lightning_dp.loading.like import loader_like


class Columns(Dataset[Any]):
    """A dataset that takes a list of indices, read as torch reads one with ``__getitems__``."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> Any:
        return self.dataset[indices]


def with_batch_size(loader: object) -> object:
    """A loader with ``batch_size=None`` and a ``BatchSampler`` as the usual one with the same batches; others as they are.

    Args:
        loader: as Lightning has prepared it for this rank.
    """
    if not isinstance(loader, DataLoader) or loader.batch_size is not None or loader.batch_sampler is not None:
        return loader
    sampler: Any = sampler_within(loader.sampler)
    if type(sampler) is not BatchSampler:
        return loader
    return loader_like(
        loader,
        Columns(loader.dataset),
        len(loader),
        batch_size=sampler.batch_size,
        sampler=sampler.sampler,
        drop_last=sampler.drop_last,
        generator=loader.generator,
    )
