from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.select import EngineError, check_engine_name, first_line, select_engine
from lightning_dp.functional.gradient import Engine
from lightning_dp.functional.microbatch import BatchAxisError
from tests.engines.family import case

PARAMETERS = {"w": torch.ones(3)}
Trial = Callable[[Engine], None]


def trial(loss_function: Any, batch: Any = None) -> Trial:
    return lambda engine: (
        engine.clipped_sum(loss_function, PARAMETERS, torch.ones(2, 3) if batch is None else batch, 2, 1.0) and None
    )


def smooth(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum(), []


def branching(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    return (parameters["w"] * batch).sum() * (2.0 if batch.sum().item() > 0 else 1.0), []


class BugError(Exception):
    """A mistake in the user's own code."""


def buggy(parameters: Any, batch: Tensor) -> tuple[Tensor, Any]:
    raise BugError("no such layer\nand a long story")


@pytest.mark.parametrize(("name", "chosen"), [("auto", "vmap"), ("vmap", "vmap"), ("loop", "loop")])
def test_what_can_be_traced_gets_the_engine_asked_for(name: Any, chosen: str) -> None:
    selection = select_engine(name, trial(smooth))
    assert selection.engine.name == chosen
    assert selection.reason is None


def test_auto_falls_back_to_the_loop_and_names_the_reason() -> None:
    selection = select_engine("auto", trial(branching))
    assert isinstance(selection.engine, LoopEngine)
    assert selection.reason is not None
    assert selection.reason.startswith("vmap cannot trace this training_step: ")
    assert ".item()" in selection.reason
    assert "\n" not in selection.reason


def test_auto_falls_back_for_recurrent_layers() -> None:
    of = case("recurrent", 2, 0)

    def of_case(engine: Engine) -> None:
        engine.clipped_sum(of.loss_function(), of.parameters(), of.batch, 2, 1.0)

    selection = select_engine("auto", of_case)
    assert isinstance(selection.engine, LoopEngine)
    assert selection.reason


def test_vmap_by_name_refuses_what_it_cannot_trace() -> None:
    with pytest.raises(
        EngineError, match=r"engine='vmap' cannot run this training_step: .*item.*engine='loop'"
    ) as refusal:
        select_engine("vmap", trial(branching))
    assert isinstance(refusal.value.__cause__, RuntimeError)


def test_the_loop_by_name_takes_what_vmap_cannot_trace() -> None:
    assert select_engine("loop", trial(branching)).engine.name == "loop"


@pytest.mark.parametrize("name", ["auto", "loop"])
def test_a_bug_in_the_training_step_surfaces_unchanged(name: Any) -> None:
    with pytest.raises(BugError) as surfaced:
        select_engine(name, trial(buggy))
    assert type(surfaced.value) is BugError
    assert str(surfaced.value) == "no such layer\nand a long story"
    assert any(entry.name == "buggy" for entry in surfaced.traceback)


def test_a_bug_under_vmap_by_name_is_named_and_chained() -> None:
    with pytest.raises(EngineError, match=r"cannot run this training_step: no such layer\. Use") as refusal:
        select_engine("vmap", trial(buggy))
    assert isinstance(refusal.value.__cause__, BugError)


@pytest.mark.parametrize("name", ["auto", "vmap", "loop"])
def test_a_batch_without_a_row_per_example_is_refused_by_every_choice(name: Any) -> None:
    with pytest.raises(BatchAxisError):
        select_engine(name, trial(smooth, torch.ones(3, 3)))


def test_nothing_but_errors_is_taken_for_a_refusal() -> None:
    def interrupted(engine: Engine) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        select_engine("auto", interrupted)


@pytest.mark.parametrize("name", ["hooks", "", "Vmap"])
def test_an_unknown_engine_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"engine='{name}': expected one of auto, ghost, vmap, loop"):
        check_engine_name(name)


def test_the_names_there_are_pass() -> None:
    for name in ("auto", "ghost", "vmap", "loop"):
        check_engine_name(name)


def test_the_first_line_of_an_error_is_what_is_quoted() -> None:
    assert first_line(ValueError("\n  one.\ntwo")) == "one"
    assert first_line(ValueError()) == "ValueError"
