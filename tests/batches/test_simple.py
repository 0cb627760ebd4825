"""The short way through a batch of tensors gives what the long one gives."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.batches.alike import put_together
from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.batches.microbatch import batch_of_one, rows, take
from lightning_dp.batches.simple import flattened, is_simple, mapped

Pair = namedtuple("Pair", "x y")
X, Y = torch.arange(12.0).reshape(4, 3), torch.arange(4)
SIMPLE: list[Any] = [[X, Y], (X, Y), {"y": Y, "x": X}, {"x": X}, (X,)]
OTHERS: list[Any] = [X, [X, 1], [X, [Y]], Pair(X, Y), OrderedDict(x=X), [], {}, (), [nn.Parameter(X)], {"x": ["a"] * 4}]


@pytest.mark.parametrize("batch", SIMPLE + OTHERS, ids=lambda batch: str(type(batch).__name__))
def test_a_short_way_is_as_the_long_one(batch: Any) -> None:
    assert is_simple(batch) == any(batch is one for one in SIMPLE)
    leaves, structure = flattened(batch)
    long, of_long = pytree.tree_flatten(batch)
    assert structure == of_long
    assert all(one is other for one, other in zip(leaves, long, strict=True))
    if is_simple(batch):
        assert same(mapped(torch.neg, batch), pytree.tree_map(torch.neg, batch))
        assert same(close_containers(open_containers(batch)), batch)
        one = batch_of_one(batch, 2)
        assert same(one, pytree.tree_map(lambda part: part[2:3], batch))
        assert same(rows(batch, 1, 2), take(batch, [1, 2]))
        assert same(put_together([batch_of_one(batch, at) for at in range(4)])[0].batch, batch)
        for part in pytree.tree_leaves(one):
            part.zero_()  # nobody else's
        assert same(batch_of_one(batch, 2), pytree.tree_map(lambda part: part[2:3], batch))


def same(one: Any, other: Any) -> bool:
    first, second = pytree.tree_flatten(one), pytree.tree_flatten(other)
    return first[1] == second[1] and all(
        isinstance(a, Tensor) and torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True)
    )
