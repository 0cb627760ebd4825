"""A loader with the settings of another, over another dataset."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader


class _AsLong(DataLoader[Any]):
    """A loader that says how many batches it has; where its examples are shared among ranks, how many one rank has."""

    batches = 0

    def __len__(self) -> int:
        return -(-self.batches // int(getattr(self.sampler, "num_replicas", 1)))


def loader_like(loader: DataLoader[Any], dataset: Any, batches: int, **changes: Any) -> DataLoader[Any]:
    """A loader over ``dataset`` with the workers, ``collate_fn`` and batch size of ``loader``.

    Args:
        loader: the user's.
        dataset: what is read instead of its dataset.
        batches: what ``len`` says.
        changes: arguments of ``DataLoader`` that are others, its sampling among them.
    """
    kept = {
        "batch_size": loader.batch_size,
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": loader.persistent_workers,
    }
    as_long: type[_AsLong] = type(
        "AsLong", (_AsLong,), {"batches": batches}
    )  # Lightning makes another of the same class
    return as_long(dataset, **{**kept, **changes})
