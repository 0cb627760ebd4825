"""Tensors are read in one operation, and come out as if they had been read one by one and collated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import Subset, TensorDataset, default_collate

from lightning_dp.loading.examples import Drawn, Examples
from lightning_dp.loading.reading import columns_of, read

TENSORS = {
    "features and labels": (torch.arange(12.0).reshape(4, 3).half(), torch.tensor([3, 2, 1, 0])),
    "one": (torch.arange(4) > 1,),
    "not in one piece": (torch.arange(12.0).reshape(3, 4).T,),
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("indices", [[2], [3, 0, 1], [1, 1]])
def test_columns_are_what_collating_makes_of_the_items(name: str, indices: list[int]) -> None:
    dataset = TensorDataset(*TENSORS[name])
    found, one_by_one = columns_of(dataset, indices), default_collate(read(dataset, indices))
    assert type(found) is type(one_by_one)
    torch.testing.assert_close(found, one_by_one, rtol=0, atol=0)
    loaded = Examples(dataset, default_collate).__getitems__(Drawn(indices, [0] * len(indices)))
    torch.testing.assert_close(loaded, one_by_one, rtol=0, atol=0)


class Own(TensorDataset):
    def __getitem__(self, index: Any) -> Any:
        return tuple(2 * tensor[index] for tensor in self.tensors)


@pytest.mark.parametrize(
    "dataset", [Own(torch.arange(3.0)), Subset(TensorDataset(torch.arange(3.0)), [2, 1, 0]), [1.0, 2.0, 3.0]]
)
def test_whoever_may_make_something_else_of_an_index_is_asked(dataset: Any) -> None:
    assert columns_of(dataset, [0, 1]) is None


def test_a_collate_fn_of_the_users_own_gets_the_items() -> None:
    dataset = TensorDataset(torch.arange(4.0))
    examples = Examples(dataset, lambda rows: torch.stack([x for (x,) in rows]) + 1)
    found = examples.__getitems__(Drawn([2, 0], [7, 8]))
    torch.testing.assert_close(found, torch.tensor([3.0, 1.0]))
