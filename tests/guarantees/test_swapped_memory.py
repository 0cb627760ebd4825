"""What a training_step does to the memory of tensors trains as it should or is refused by name; it never ends the process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PATIENCE
from tests.guarantees.swapped_memory import REFUSED, RUNS, TRAINED

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes() -> list[dict[str, Any]]:
    run = subprocess.run(
        [sys.executable, "-m", "tests.guarantees.swapped_memory"],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert run.returncode == 0, f"ended by {run.returncode} in {lines[-1:]}: {run.stderr[-2000:]}"
    found = [line for line in lines if "begins" not in line]
    assert len(found) == len(RUNS)
    return found


def test_a_tensor_that_was_there_is_refused_with_its_name_and_the_line_on_every_engine(
    outcomes: list[dict[str, Any]],
) -> None:
    named = {step.__name__: name for step, name in REFUSED.items()}
    for one in outcomes:
        if one["step"] in named:
            where = "swapped_memory.py:", f" in {one['step']})"
            assert "PreflightError" in (one["error"] or ()), one
            assert all(part in one["text"] for part in (named[one["step"]], *where, "expected")), one
            assert one["steps"] == one["first"], one
            assert one["same tensors"], one
            assert one["as before"], one


def test_what_the_step_has_made_itself_is_its_own(outcomes: list[dict[str, Any]]) -> None:
    for step in TRAINED:
        found = {(one["engine"], one["first"]): one for one in outcomes if one["step"] == step.__name__}
        assert found["auto", 1]["weights"] == pytest.approx(found["loop", 1]["weights"], rel=1e-4, abs=1e-5)
        for (engine, _), one in found.items():
            assert one["same tensors"], one
            assert one["as before"], one
            if engine in ("auto", "loop"):
                assert one["error"] is None, one
            elif one["error"] is not None:  # an engine that was asked for by name says which line it cannot run
                assert "EngineError" in one["error"], one
                assert f"engine='{engine}' cannot run" in one["text"], one
                assert "swapped_memory.py:" in one["text"], one
