from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.engines.explain import explain
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.rounded import RoundedEngine
from lightning_dp.engines.select import ENGINES, EngineError, EngineName, check_engine_name, make_engine, select_engine
from tests.engines.family import case

PARAMETERS = {"w": torch.ones(3)}
Check = Callable[[Engine], None]


def trying(loss_function: Any, batch: Any = None) -> Check:
    return lambda engine: (
        engine.clipped_sum(loss_function, PARAMETERS, torch.ones(2, 3) if batch is None else batch, 2, 1.0) and None
    )


def smooth(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum(), []


def through_numpy(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum() * float(np.sign(batch.numpy().sum())), []


def reading(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum() * batch.sum().item(), []


def branching(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum() * (2.0 if batch.sum() > 0 else 1.0), []


DIFFERENT = torch.tensor([[1.0, 0, 0], [0, -1.0, 0]])


class BugError(Exception):
    """A mistake in the user's own code."""


def buggy(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    raise BugError("no such layer\nand a long story")


@pytest.mark.parametrize(("name", "chosen"), [("auto", "ghost"), ("vmap", "vmap"), ("loop", "loop")])
def test_what_can_be_traced_gets_the_engine_asked_for(name: Any, chosen: str) -> None:
    selection = select_engine(name, trying(smooth), nn.Module())
    assert selection.engine.name == chosen
    assert selection.reason is None


def test_auto_falls_back_to_the_loop_and_names_the_reason() -> None:
    selection = select_engine("auto", trying(through_numpy), nn.Module())
    assert isinstance(selection.engine, LoopEngine)
    assert selection.reason is not None
    assert selection.reason.startswith(
        "ghost and vmap cannot run this training_step: it hands a tensor to code outside torch"
    )
    assert "\n" not in selection.reason


@pytest.mark.parametrize("name", ["auto", "vmap"])
def test_the_layer_that_cannot_run_is_named_with_the_users_line(name: Any) -> None:
    of = case("recurrent", 2, 0)

    def of_case(engine: Engine) -> None:
        engine.clipped_sum(of.loss_function(), of.parameters(), of.batch, 2, 1.0)

    if name == "auto":
        told = select_engine(name, of_case, of.module).describe()
        assert told.startswith(
            "lightning_dp: engine 'loop': ghost cannot run this training_step: torch cannot run this operator"
        )
    else:
        with pytest.raises(EngineError) as refusal:
            select_engine(name, of_case, of.module)
        told = str(refusal.value)
        assert told.startswith("engine='vmap' cannot run this training_step: it writes an example's values in place")
        assert "Use engine='auto' or engine='loop', or change that line." in told
    assert re.search(r"family.py:\d+ in forward, layer 'cell' of type LSTM\)", told)


FAILURES: dict[str, tuple[Any, str]] = {
    "a tensor made outside": (lambda x: torch.zeros(1, 3).copy_(x), "make that tensor with new_zeros"),
    "NumPy": (lambda x: x * float(x.numpy().sum()), "outside torch"),
    "its own autograd": (lambda x: x.requires_grad_(), "torch.func.grad would do"),
    "one_hot": (lambda x: torch.nn.functional.one_hot((x > 0).long()).sum(-1), ""),
    "a shape": (lambda x: x.repeat_interleave((x[0] > -9).long(), dim=1), "the shape of a tensor depends"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_kind_of_failure_says_what_to_change_and_where(name: str) -> None:
    function, words = FAILURES[name]

    def failing(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
        return (parameters["w"] * function(batch)).sum(), []

    with pytest.raises(EngineError) as refusal:
        select_engine("vmap", trying(failing), nn.Module())
    assert words in str(refusal.value)
    assert "test_select.py:" in str(refusal.value)


def test_a_line_that_decides_alike_for_many_does_not_cost_the_engine() -> None:
    selection = select_engine("auto", trying(branching, DIFFERENT), nn.Module())
    assert selection.engine.name == "ghost"
    assert "takes a value of an example into Python" in selection.describe()
    assert f"test_select.py:{branching.__code__.co_firstlineno + 1} in branching" in selection.describe()


def test_a_line_in_which_no_two_examples_are_alike_does_and_is_named() -> None:
    selection = select_engine("auto", trying(reading, DIFFERENT), nn.Module())
    assert isinstance(selection.engine, LoopEngine)
    assert selection.reason is not None
    assert selection.reason.startswith(
        "ghost and vmap would run one by one: training_step takes a value of an example into Python"
    )
    assert f"test_select.py:{reading.__code__.co_firstlineno + 1} in reading" in selection.reason


def test_auto_falls_back_for_recurrent_layers() -> None:
    of = case("recurrent", 2, 0)

    def of_case(engine: Engine) -> None:
        engine.clipped_sum(of.loss_function(), of.parameters(), of.batch, 2, 1.0)

    selection = select_engine("auto", of_case, nn.Module())
    assert isinstance(selection.engine, LoopEngine)
    assert selection.reason


def test_vmap_by_name_refuses_what_it_cannot_trace() -> None:
    with pytest.raises(
        EngineError, match=r"engine='vmap' cannot run this training_step: .*NumPy.*engine='loop'"
    ) as refusal:
        select_engine("vmap", trying(through_numpy), nn.Module())
    assert isinstance(refusal.value.__cause__, RuntimeError)


def test_the_loop_by_name_takes_what_vmap_cannot_trace() -> None:
    assert select_engine("loop", trying(through_numpy), nn.Module()).engine.name == "loop"


@pytest.mark.parametrize("name", ["auto", "loop"])
def test_a_bug_in_the_training_step_surfaces_unchanged(name: Any) -> None:
    with pytest.raises(BugError) as surfaced:
        select_engine(name, trying(buggy), nn.Module())
    assert type(surfaced.value) is BugError
    assert str(surfaced.value) == "no such layer\nand a long story"
    assert any(entry.name == "buggy" for entry in surfaced.traceback)


def test_a_bug_under_vmap_by_name_is_named_and_chained() -> None:
    with pytest.raises(
        EngineError, match=r"run this training_step: no such layer \(.*test_select.py:\d+ in buggy\)\. Use"
    ) as refusal:
        select_engine("vmap", trying(buggy), nn.Module())
    assert isinstance(refusal.value.__cause__, BugError)


@pytest.mark.parametrize("name", ["auto", "vmap", "loop"])
def test_a_batch_without_a_row_per_example_is_refused_by_every_choice(name: Any) -> None:
    with pytest.raises(BatchAxisError):
        select_engine(name, trying(smooth, torch.ones(3, 3)), nn.Module())


def test_nothing_but_errors_is_taken_for_a_refusal() -> None:
    def interrupted(engine: Engine) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_engine("auto", interrupted, nn.Module())


@pytest.mark.parametrize("name", ["hooks", "", "Vmap"])
def test_an_unknown_engine_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"engine='{name}': expected one of auto, ghost, vmap, loop"):
        check_engine_name(name)


def test_the_names_there_are_pass() -> None:
    for name in ("auto", "ghost", "vmap", "loop"):
        check_engine_name(name)


def test_every_engine_can_be_asked_for_and_says_what_it_is() -> None:
    assert {"auto", *ENGINES} == set(get_args(EngineName))
    made = {name: make_engine(name, nn.Module()) for name in ENGINES}
    assert {name: engine.name for name, engine in made.items()} == {name: name for name in ENGINES}
    assert [name for name, engine in made.items() if engine.is_reference] == ["loop"]
    assert [name for name, engine in made.items() if engine.brings_layers] == ["ghost"]
    assert [name for name, engine in made.items() if not engine.grows_with_rows] == ["loop"]


@pytest.mark.parametrize("name", ENGINES)
def test_a_rounded_engine_says_of_itself_what_the_engine_in_it_says(name: str) -> None:
    engine = make_engine(name, nn.Module())
    rounded = RoundedEngine(engine)
    assert (rounded.name, rounded.is_reference, rounded.grows_with_rows) == (name, engine.is_reference, False)
    assert rounded.sum_dtype == torch.int64
    assert engine.sum_dtype is None


def test_the_first_line_of_an_error_is_what_is_quoted() -> None:
    assert explain(ValueError("\n  one.\ntwo")) == "one"
    assert explain(ValueError()) == "ValueError"


@pytest.mark.parametrize("name", ["auto", "ghost", "loop"])
def test_discrete_noise_gets_the_reference_with_its_gradients_rounded(name: Any) -> None:
    selection = select_engine(name, trying(smooth), nn.Module(), 1000)
    assert isinstance(selection.engine, RoundedEngine)
    assert (selection.engine.name, selection.engine.resolution, selection.slower) == ("loop", 1000, ())
    assert selection.describe().startswith("lightning_dp: engine 'loop'")
