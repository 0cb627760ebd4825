"""How a loader reads its dataset: as torch does, also where the dataset fetches several examples at once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_dp.engines.user_code import no_end_of_the_data


def read(dataset: Any, indices: Sequence[int]) -> Any:
    """What ``collate_fn`` is given for these indices.

    A list with one item for each; of a dataset with ``__getitems__``, whatever that returns, such as a dict of columns.

    Example:
        >>> read(["a", "b", "c"], [2, 0])
        ['c', 'a']
    """
    several = getattr(dataset, "__getitems__", None)
    given = [int(index) for index in indices]
    with no_end_of_the_data(f"dataset={type(dataset).__name__}"):
        return several(given) if callable(several) else [dataset[index] for index in given]


def columns_of(dataset: Any, indices: Sequence[int]) -> list[Tensor] | None:
    """What ``default_collate`` makes of these items of a ``TensorDataset``, in one operation for each of its tensors.

    ``None`` for any other data set.

    Example:
        >>> columns_of(TensorDataset(torch.arange(3.0), torch.tensor([5, 6, 7])), [2, 0])
        [tensor([2., 0.]), tensor([7, 5])]
    """
    if type(dataset) is not TensorDataset or not indices:
        return None
    if any(type(tensor) is not Tensor or tensor.layout is not torch.strided for tensor in dataset.tensors):
        return None
    chosen = torch.tensor([int(index) for index in indices])
    return [tensor[chosen.to(tensor.device)] for tensor in dataset.tensors]


def item(dataset: Any, index: int) -> Any:
    """One example by itself; of a dataset that returns columns, columns with one row."""
    found = read(dataset, [index])
    return found[0] if type(found) is list and len(found) == 1 else found


@dataclass(frozen=True)
class Row:
    """An example of a dataset that returns columns: its index, since by itself it would be columns with one row."""

    index: int


def record(dataset: Any, index: int) -> Any:
    """One example for :func:`together`: read now, or a :class:`Row` that is read with the others."""
    found = read(dataset, [index])
    return found[0] if type(found) is list and len(found) == 1 else Row(index)


def together(dataset: Any, records: Sequence[Any]) -> Any:
    """What ``collate_fn`` is given for these records of one dataset."""
    rows = [one.index for one in records if isinstance(one, Row)]
    return read(dataset, rows) if rows else list(records)


def order(dataset: Any) -> str:
    """A digest of what says which example is where, in so far as torch's own datasets say it: the indices of a ``Subset``.

    Nothing is read. Of any other dataset, its length is all that is known.
    """
    hashed = hashlib.sha256()
    for part in _parts(dataset):
        hashed.update(part)
    return hashed.hexdigest()


def _parts(dataset: Any) -> list[bytes]:
    if isinstance(dataset, Subset):
        indices = np.asarray([int(index) for index in dataset.indices], dtype=np.int64)
        return [b"subset", indices.tobytes(), *_parts(dataset.dataset)]
    if isinstance(dataset, ConcatDataset):
        return [b"concatenated", *(part for one in dataset.datasets for part in _parts(one))]
    return [str(len(dataset)).encode() if hasattr(dataset, "__len__") else b"?"]
