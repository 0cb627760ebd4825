from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.engines.protocol import Engine, scalar_loss
from lightning_dp.engines.select import make_engine

ENGINES: list[Engine] = [make_engine(name, nn.Module()) for name in ("ghost", "vmap", "loop")]
EVERY_ENGINE = pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine.name)
PARAMETERS = {"w": torch.ones(3)}


def linear(parameters: Any, batch: Any) -> tuple[Tensor, Any]:
    inputs = batch["x"] if isinstance(batch, dict) else batch
    return (parameters["w"] * inputs).sum(), []


@EVERY_ENGINE
@pytest.mark.parametrize(
    ("loss", "error", "text"),
    [
        (None, TypeError, "loss of type NoneType: expected a tensor with one element.*training_step return the loss"),
        (0.25, TypeError, "loss of type float: expected a tensor"),
        ({"value": torch.tensor(1.0)}, TypeError, "loss of type dict: expected a tensor.*'loss'"),
        (torch.ones(3), ValueError, r"loss of shape \(3,\): expected a single number.*\.mean\(\)"),
        (torch.ones(0), ValueError, r"loss of shape \(0,\)"),
    ],
)
def test_a_loss_that_is_not_one_number_is_refused(engine: Engine, loss: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        engine.clipped_sum(lambda *_: (loss, []), PARAMETERS, torch.ones(2, 3), 2, 1.0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_loss_of_one_element_is_a_number(shape: tuple[int, ...]) -> None:
    assert scalar_loss(torch.ones(shape)).shape == ()


@EVERY_ENGINE
@pytest.mark.parametrize("physical", [1, 2])
def test_a_tensor_without_a_row_per_example_is_refused_by_place_and_shape(engine: Engine, physical: int) -> None:
    batch = {"x": torch.ones(physical, 3), "y": [torch.ones(physical), torch.ones(3, physical)]}
    with pytest.raises(
        BatchAxisError, match=rf"batch\['y'\]\[1\] has shape \(3, {physical}\): expected {physical} rows"
    ):
        engine.clipped_sum(linear, PARAMETERS, batch, physical, 1.0)


@EVERY_ENGINE
def test_an_array_that_only_numpy_can_read_is_refused(engine: Engine) -> None:
    """Every example would see every other's rows of it."""
    with pytest.raises(BatchAxisError, match=r"batch\['ids'\] is of type ndarray"):
        engine.clipped_sum(linear, PARAMETERS, {"x": torch.ones(2, 3), "ids": torch.arange(2).numpy()}, 2, 1.0)


def by_name(parameters: Any, batch: Any) -> tuple[Tensor, Any]:
    (name,) = batch["name"]
    return (parameters["w"] * batch["x"]).sum() * len(name), []


NAMED = {"x": torch.eye(3), "name": ["a", "bb", "ccc"]}


@EVERY_ENGINE
@pytest.mark.filterwarnings("ignore:training_step reads batch:UserWarning")
def test_each_example_gets_its_own_string(engine: Engine) -> None:
    result = engine.clipped_sum(by_name, PARAMETERS, NAMED, 3, 10.0)
    assert result.gradient["w"].tolist() == [1.0, 2.0, 3.0]


@EVERY_ENGINE
def test_constants_are_shared_by_all_examples(engine: Engine) -> None:
    def loss(parameters: Any, batch: Any) -> tuple[Tensor, Any]:
        return (parameters["w"] * batch["x"]).sum() * batch["weight"] * (batch["task"] == "sum"), []

    batch = {"x": torch.eye(3), "weight": 0.5, "task": "sum", "mask": None}
    assert engine.clipped_sum(loss, PARAMETERS, batch, 3, 10.0).gradient["w"].tolist() == [0.5] * 3


@EVERY_ENGINE
def test_outputs_that_differ_from_example_to_example_are_refused(engine: Engine) -> None:
    def sometimes(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
        loss = (parameters["w"] * batch).sum()
        return loss, [loss] if batch[0, 0] > 0 else []

    batch = torch.tensor([[1.0, 0, 0], [-1.0, 0, 0]])
    with pytest.raises(ValueError, match=r"outputs of 2 different structures: expected.*same things for every example"):
        engine.clipped_sum(sometimes, PARAMETERS, batch, 2, 1.0)
