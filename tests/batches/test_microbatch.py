from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from lightning_dp.batches.microbatch import BatchAxisError, batch_of_one, check_batch_axis, padded, split

Pair = namedtuple("Pair", ["image", "names"])


@given(examples=st.integers(0, 500), physical_batch_size=st.integers(1, 600))
def test_a_split_keeps_every_example_once_in_few_and_equal_pieces(examples: int, physical_batch_size: int) -> None:
    drawn = np.random.default_rng(examples).permutation(examples)
    pieces = split(drawn, physical_batch_size)
    sizes = [len(piece) for piece in pieces]
    assert np.array_equal(np.concatenate([*pieces, np.empty(0, dtype=np.int64)]), drawn)
    assert all(0 < size <= physical_batch_size for size in sizes)
    assert len(pieces) == -(-examples // physical_batch_size)
    assert not sizes or max(sizes) - min(sizes) <= 1


BATCHES: dict[str, Any] = {
    "tensor": torch.arange(12.0).view(4, 3),
    "pair": (torch.arange(12.0).view(4, 3), torch.arange(4)),
    "dict of list": {"x": [torch.arange(4.0)], "y": {"z": torch.arange(8).view(4, 2)}},
    "list of strings": {"x": torch.arange(4.0), "name": ["a", "b", "c", "d"]},
    "strings in a named tuple": Pair(torch.arange(4.0), ["a", "b", "c", "d"]),
    "strings in an ordered dict": OrderedDict(x=torch.arange(4.0), name=("a", "b", "c", "d")),
    "columns of words": [torch.arange(4.0), [("a", "b", "c", "d"), ("e", "f", "g", "h")]],
    "list of numbers": (torch.arange(4.0), [1, 2, 3, 4]),
    "constants": {"x": torch.arange(4.0), "task": "classify", "weight": 0.5, "mask": None, "flag": True},
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_examples_of_a_batch_put_together_again_are_the_batch(name: str) -> None:
    batch = BATCHES[name]
    check_batch_axis(batch, 4)
    ones = [batch_of_one(batch, index) for index in range(4)]
    for one in ones:
        check_batch_axis(one, 1)

    def together(*parts: Any) -> Any:
        return torch.cat(parts) if isinstance(parts[0], Tensor) else parts

    def flat(nest: Any) -> list[Any]:
        return pytree.tree_leaves(nest)

    assert {type(one) for one in ones} == {type(batch)}
    if all(isinstance(leaf, Tensor) for leaf in flat(batch)):
        again = pytree.tree_map(together, *ones)
        assert all(torch.equal(one, other) for one, other in zip(flat(again), flat(batch), strict=True))
    elif name != "constants":
        others = [leaf for leaf in flat(batch) if not isinstance(leaf, Tensor)]
        seen = [[leaf for leaf in flat(one) if not isinstance(leaf, Tensor)] for one in ones]
        assert sorted(str(leaf) for one in seen for leaf in one) == sorted(map(str, others))
    else:
        assert all(one["task"] == "classify" and one["weight"] == 0.5 and one["mask"] is None for one in ones)


def test_an_example_sees_what_default_collate_made_of_it_and_nothing_else() -> None:
    records = [{"x": torch.tensor([i, -i]), "y": i, "name": f"n{i}", "words": [f"a{i}", f"b{i}"]} for i in range(3)]
    batch = default_collate(records)
    check_batch_axis(batch, 3)
    for index, record in enumerate(records):
        alone, expected = batch_of_one(batch, index), default_collate([record])
        assert torch.equal(alone["x"], expected["x"])
        assert torch.equal(alone["y"], expected["y"])
        assert alone["name"] == expected["name"]
        assert [tuple(column) for column in alone["words"]] == [tuple(column) for column in expected["words"]]


class Record:
    """An object of the user's that no one can look into."""


@pytest.mark.parametrize(
    ("batch", "text"),
    [
        (torch.zeros(3, 2), r"^batch has shape \(3, 2\): expected 4 rows"),
        (torch.tensor(0.0), r"^batch has shape \(\): expected 4 rows"),
        (
            {"x": torch.zeros(4), "y": [torch.zeros(4), torch.zeros(5, 4)]},
            r"^batch\['y'\]\[1\] has shape \(5, 4\)",
        ),
        ([], "^batch=list holds no tensor: expected at least one tensor with 4 rows"),
        ({"names": ["a", "b", "c", "d"]}, "^batch=dict holds no tensor"),
        ({"x": torch.zeros(4), "meta": np.zeros(4)}, r"^batch\['meta'\] is of type ndarray: expected"),
        ((torch.zeros(4), Record()), r"^batch\[1\] is of type Record: expected"),
        (Record(), "^batch is of type Record: expected"),
        (
            {"x": torch.zeros(4), "size": (32, 32)},
            r"^batch\['size'\] is a tuple of 2 strings or numbers: expected 4",
        ),
        (Pair(torch.zeros(4), ["a", "b"]), r"^batch.names is a list of 2 strings or numbers: expected 4"),
        (
            {"x": torch.zeros(4), "words": [["a", "b", "c"], ["d"], ["e"], ["f"]]},
            r"^batch\['words'\]\[0\] is a list of 3",
        ),
    ],
)
def test_a_batch_in_which_nobody_can_tell_whose_is_what_is_refused_by_place(batch: Any, text: str) -> None:
    with pytest.raises(BatchAxisError, match=text) as refusal:
        check_batch_axis(batch, 4)
    assert "collate_fn" in str(refusal.value)


@pytest.mark.parametrize("name", BATCHES)
def test_padding_adds_copies_of_the_first_example_and_keeps_the_others(name: str) -> None:
    batch = BATCHES[name]
    longer = padded(batch, 4, 7)
    check_batch_axis(longer, 7)
    for index in range(7):
        one, other = (
            pytree.tree_leaves(batch_of_one(*of)) for of in ((longer, index), (batch, index if index < 4 else 0))
        )
        assert all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True))
    assert padded(batch, 4, 4) is batch


def test_a_batch_with_a_row_too_few_is_not_padded() -> None:
    with pytest.raises(BatchAxisError, match="expected 4 rows"):
        padded(torch.zeros(3, 2), 4, 6)
