from __future__ import annotations

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers import BatchEncoding

from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.batches.microbatch import BatchAxisError, batch_of_one, check_batch_axis, take

X, Y = torch.arange(6.0).view(3, 2), torch.arange(3)
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Record:
    x: Tensor
    y: Tensor
    task: str = "classify"
    cached: Any = field(init=False, default=None)


@dataclass(frozen=True, slots=True)
class Frozen:
    x: Tensor
    y: Tensor


class Bunch(dict[str, Any]):
    """A dict whose items are attributes as well."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Own:
    """A batch class as in PyTorch's documentation of pinned memory."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def total(self) -> Tensor:
        return self.x.sum()


class Hiding(UserDict[str, Any]):
    """A mapping that knows more than its items."""

    def __init__(self, extra: Any, **items: Any) -> None:
        super().__init__(items)
        self.extra = extra


BATCHES: dict[str, Any] = {
    "dataclass": Record(X, Y),
    "frozen dataclass with slots": Frozen(X, Y),
    "UserDict": UserDict(x=X, y=Y),
    "BatchEncoding": BatchEncoding({"x": X, "y": Y}),
    "subclass of dict": Bunch(x=X, y=Y),
    "object": Own(X, Y),
    "nested": {"a": [Record(X, Y), UserDict(z=Own(X, Y))], "b": Pair(OrderedDict(c=Frozen(X, Y)), ["p", "q", "r"])},
    "mapping with a tensor beside": Hiding(X + 1, x=X),
    "mapping with a list beside": Hiding(["a", "b", "c"], x=X),
}


def tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(open_containers(nest)) if isinstance(leaf, Tensor)]


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_opened_and_closed_is_the_same(name: str) -> None:
    batch = BATCHES[name]
    again = close_containers(open_containers(batch))
    assert type(again) is type(batch)
    assert all(one is other for one, other in zip(tensors(again), tensors(batch), strict=True))


@pytest.mark.parametrize("name", BATCHES)
def test_an_example_sees_its_own_row_and_the_batch_stays_as_it_was(name: str) -> None:
    batch = BATCHES[name]
    before = [tensor.clone() for tensor in tensors(batch)]
    opened = open_containers(batch)
    check_batch_axis(opened, 3)
    ones = [close_containers(batch_of_one(opened, index)) for index in range(3)]
    assert {type(one) for one in ones} == {type(batch)}
    for rows, whole in zip(zip(*map(tensors, ones), strict=True), before, strict=True):
        assert torch.equal(torch.cat(rows), whole)
    assert all(torch.equal(a, b) for a, b in zip(tensors(batch), before, strict=True))
    assert torch.equal(torch.cat([tensors(take(opened, [2, 0]))[0]]), before[0][[2, 0]])


def test_what_a_container_knows_beside_its_items_is_split_too() -> None:
    opened = open_containers(BATCHES["mapping with a list beside"])
    assert [close_containers(batch_of_one(opened, index)).extra for index in range(3)] == [["a"], ["b"], ["c"]]
    with pytest.raises(BatchAxisError, match=r"^batch.extra has shape \(7,\)"):
        check_batch_axis(open_containers(Hiding(torch.ones(7), x=X)), 3)


def test_a_dict_whose_items_are_its_attributes_shows_the_example_either_way() -> None:
    one = close_containers(batch_of_one(open_containers(Bunch(x=X, y=Y)), 1))
    assert torch.equal(one["x"], X[1:2])
    assert torch.equal(one.x, X[1:2])


def test_methods_of_an_object_see_the_example() -> None:
    opened = open_containers(BATCHES["object"])
    assert float(close_containers(batch_of_one(opened, 1)).total()) == 5.0


class Opaque:
    def __init__(self) -> None:
        self.inside = object()


@pytest.mark.parametrize("leaf", [Opaque(), Opaque, object(), open])
def test_what_nobody_can_look_into_stays_closed_and_is_refused(leaf: Any) -> None:
    assert open_containers(leaf) is leaf
    with pytest.raises(BatchAxisError, match="is of type"):
        check_batch_axis(open_containers({"x": X, "leaf": leaf}), 3)


def test_a_tensor_in_company_of_something_opaque_is_refused_with_its_object() -> None:
    mixed = Own(X, object())
    with pytest.raises(BatchAxisError, match=r"^batch is of type Own"):
        check_batch_axis(open_containers(mixed), 3)


def test_one_opaque_object_for_each_example_is_that_examples() -> None:
    opened = open_containers({"x": X, "record": [Opaque(), Opaque(), Opaque()]})
    check_batch_axis(opened, 3)
    (record,) = batch_of_one(opened, 1)["record"]
    assert record is opened["record"][1]
