"""Batches whose examples are not on the first axis train like the same batches with them there."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.batches.axis import check_batch_axis_argument, from_front, to_front
from lightning_dp.batches.containers import close_containers, open_containers
from lightning_dp.batches.microbatch import BatchAxisError
from tests.conftest import Regressor, loader, trainer, weights

TABLE = torch.linspace(-1, 1, 3)


class OverTime(Regressor):
    """Sequences of three vectors, each weighted by a table."""

    axis = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        inputs, table, targets = batch["inputs"], batch["table"], batch["targets"]
        assert table.shape == (3,)
        assert inputs.shape[self.axis] == len(targets)
        outputs = self.net(inputs.movedim(self.axis, 0)).squeeze(-1) @ table
        return nn.functional.mse_loss(outputs, targets)


class TimeFirst(OverTime):
    axis = 1


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 3, 4, generator=generator)
    return TensorDataset(inputs, inputs.sum((1, 2)))


def collated(axis: int) -> Any:
    def collate(rows: list[Any]) -> Any:
        inputs = torch.stack([row[0] for row in rows], axis)
        return UserDict(inputs=inputs, table=TABLE, targets=torch.stack([row[1] for row in rows]))

    return collate


def trained(kind: type[OverTime], batch_axis: Any, engine: str, physical_batch_size: int | None) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind()
    private = DifferentialPrivacy(
        noise_multiplier=1.0, seed=1, batch_axis=batch_axis, engine=engine, physical_batch_size=physical_batch_size
    )
    trainer(private, max_steps=3).fit(module, loader(data(), collate_fn=collated(kind.axis)))
    return weights(module)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
def test_training_is_that_of_examples_on_the_first_axis(engine: str) -> None:
    first = trained(OverTime, {"table": None}, "loop", None)
    for size in (None, 3):
        there = trained(TimeFirst, {"inputs": 1, "table": None}, engine, size)
        torch.testing.assert_close(there, first, rtol=1e-5, atol=1e-6)


NESTS: list[tuple[Any, Any]] = [
    (torch.zeros(5, 3, 2), 1),
    ((torch.zeros(5, 3), torch.zeros(3)), 1),
    ({"x": torch.zeros(5, 3), "y": {"z": torch.zeros(2, 4, 3), "w": torch.zeros(3)}}, {"x": 1, "y.z": -1}),
    ([torch.zeros(3, 2), torch.zeros(7), "name"], {"1": None}),
    (UserDict(a=[torch.zeros(2, 3), torch.zeros(4, 3)], b=torch.zeros(3)), {"a": 1}),
    ({"x": {"y": torch.zeros(2, 3), "s": torch.zeros(5)}}, {"x": 1, "x.s": None}),
]


@pytest.mark.parametrize(("batch", "axis"), NESTS)
def test_what_is_brought_to_the_front_is_brought_back(batch: Any, axis: Any) -> None:
    opened = open_containers(batch)
    moved = to_front(opened, axis)
    leaves = torch.utils._pytree.tree_leaves(moved)
    assert {len(leaf) for leaf in leaves if isinstance(leaf, Tensor)} == {3}
    back = torch.utils._pytree.tree_leaves(from_front(moved, axis))
    for one, other in zip(back, torch.utils._pytree.tree_leaves(opened), strict=True):
        assert one.shape == other.shape if isinstance(one, Tensor) else one == other
    assert type(close_containers(from_front(moved, axis))) is type(batch)


@pytest.mark.parametrize(
    ("axis", "text"),
    [
        ({"z": 1}, "batch_axis names 'z': expected a field of the batch, which has x, y"),
        ({"x": 4}, r"batch\['x'\] has shape \(5, 3\): expected an axis 4"),
        ({"x": None, "y": None}, "all tensors are shared: expected at least one"),
    ],
)
def test_a_declaration_that_does_not_fit_is_refused(axis: Any, text: str) -> None:
    with pytest.raises(BatchAxisError, match=text):
        to_front({"x": torch.zeros(5, 3), "y": torch.zeros(3)}, axis)


@pytest.mark.parametrize("wrong", [None, 0.5, True, "inputs", {"x": 1.0}, {1: 0}, {}.items()])
def test_what_is_no_axis_is_refused_at_once(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^batch_axis=.*expected the axis of the examples"):
        check_batch_axis_argument(wrong)
    with pytest.raises(ValueError, match="batch_axis="):
        DifferentialPrivacy(noise_multiplier=1.0, batch_axis=wrong)


def test_views_are_made_of_examples_wherever_they_are() -> None:
    class Images(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            images, scale = batch
            assert images.shape[1:2] == (2,)  # the example's two views
            assert images.shape == (3, 2, 4, 4)
            return self.net(images.movedim(1, 0).mean((1, 2))).square().mean() * scale

    def collate(rows: list[Any]) -> Any:
        return torch.stack([row[0] for row in rows], 1), torch.tensor(2.0)

    private = DifferentialPrivacy(noise_multiplier=1.0, batch_axis={"0": 1, "1": None})
    images = TensorDataset(torch.rand(16, 3, 4, 4))
    trainer(private, AugmentationMultiplicity(2), max_steps=2).fit(Images(), loader(images, 8, collate_fn=collate))
