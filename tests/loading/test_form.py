"""What is put around an example on its way to the engines comes off on its way back."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import open_containers
from lightning_dp.batches.microbatch import Apart, BatchAxisError, Element, batch_of_one
from lightning_dp.batches.transforms import Flip
from lightning_dp.batches.views import Views
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.rows import DroppedExamplesError
from tests.conftest import loader, regressor, trainer

CPU = torch.device("cpu")


def form(**options: Any) -> ExampleForm:
    module = regressor()
    trainer(max_steps=1).fit(module, loader())  # attached to a Trainer that knows its data
    return ExampleForm(module, CPU, **options)


def leaves(batch: Any) -> list[Any]:
    return [one.tolist() if isinstance(one, Tensor) else one for one in pytree.tree_leaves(open_containers(batch))]


THREE = torch.arange(3)
OF_ANY_SIZE = ([torch.ones(2), torch.ones(5), torch.ones(1)], [torch.ones(1), torch.ones(2), torch.ones(1)])
BATCHES: dict[str, tuple[Any, Any]] = {
    "tuple": (0, (torch.arange(6.0).reshape(3, 2), THREE)),
    "second axis": (1, {"text": torch.arange(6).reshape(2, 3), "kind": THREE}),
    "by field": ({"x": 1, "table": None}, {"x": torch.ones(2, 3), "table": torch.arange(4.0), "of": THREE}),
    "own container": (0, UserDict(x=torch.arange(6.0).reshape(3, 2), name=["a", "b", "c"])),
    "lists": ({"0": "list", "1": "list"}, OF_ANY_SIZE),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_comes_back_as_it_was_collated(name: str) -> None:
    axis, batch = BATCHES[name]
    there = form(axis=axis)
    back = there.closed(there.to_engine(batch, drawn=3))
    assert type(back) is type(batch)
    assert leaves(back) == leaves(batch)


@pytest.mark.parametrize("name", BATCHES)
def test_an_example_comes_back_as_a_batch_of_one(name: str) -> None:
    axis, batch = BATCHES[name]
    there = form(axis=axis)
    ones = [there.to_user(batch_of_one(there.to_engine(batch), index)) for index in range(3)]
    again = [there.opened(one) for one in ones]
    for index, one in enumerate(again):
        assert leaves(one) == leaves(batch_of_one(there.opened(batch), index))


def test_views_and_units_come_off_in_the_opposite_order() -> None:
    """A unit of two examples with three views of each is an ordinary batch of six for training_step."""
    there = form(views=Views(3, Flip()))
    images, kinds = torch.arange(4 * 2 * 5 * 5.0).reshape(4, 2, 5, 5), torch.arange(4)
    rows = there.with_views(there.to_engine((images, kinds)), np.arange(4), seed=1)
    units = there.in_units(rows, 2, 2)
    for unit in range(2):
        seen, of = there.to_user(batch_of_one(units, unit))
        assert of.tolist() == [2 * unit] * 3 + [2 * unit + 1] * 3
        for view, kind in zip(seen, of, strict=True):
            assert torch.equal(view, images[kind]) or torch.equal(view, images[kind].flip(-1))


def test_without_views_and_units_nothing_is_put_on() -> None:
    there, batch = form(), torch.arange(3)
    assert there.with_views(batch, np.arange(3), 0) is batch
    assert there.in_units(batch, 3, 1) is batch
    assert there.with_one_view() is there


def test_one_view_is_enough_for_a_look() -> None:
    one = form(views=Views(3, Flip())).with_one_view()
    assert one.views is not None
    assert one.views.k == 1


def test_examples_that_are_missing_are_noticed() -> None:
    with pytest.raises(DroppedExamplesError, match="2 rows for 3 examples"):
        form().to_engine(torch.zeros(2, 4), drawn=3)


class Doubling:
    """What a hook does to a batch, as :class:`~lightning_dp.loading.form.Changes`."""

    def applied(self, batch: Any) -> Any:
        return batch * 2

    def applied_to_one(self, batch: Any) -> Any:
        return batch * 2


def test_changes_of_hooks_reach_the_engines_once_they_are_known() -> None:
    apart = Apart([Element(torch.ones(1)), Element(torch.ones(1))])
    assert form(hooks=Doubling()).to_engine(torch.ones(2)).tolist() == [2.0, 2.0]
    assert [one.content.tolist() for one in form(hooks=Doubling()).to_engine(apart).elements] == [[2.0], [2.0]]
    assert [one.content.tolist() for one in form().to_engine(apart).elements] == [[1.0], [1.0]]


def test_examples_collated_alone_are_never_joined() -> None:
    apart = form().to_engine(Apart([Element(torch.ones(1)), Element(torch.zeros(1))]))
    assert form().to_user(batch_of_one(apart, 1)).tolist() == [0.0]
    with pytest.raises(BatchAxisError, match="2 examples that were collated one by one: expected one"):
        form().to_user(apart)
