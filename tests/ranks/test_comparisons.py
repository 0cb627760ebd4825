"""Engines compared in every step of runs on two ranks, in float32 and bfloat16: no false alarm, and none that is missed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import PATIENCE
from tests.ranks.comparisons import STEPS, WRONG

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("comparisons")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.comparisons", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    def load(case: str, rank: int) -> Any:
        path = folder / f"{case}-2-{rank}.pt"
        assert path.exists(), f"rank {rank} of {case} did not end: {done.stderr[-3000:]}"
        return torch.load(path, weights_only=True)

    return load


def test_ordinary_modules_are_compared_and_not_refused(results: Any) -> None:
    for rank in (0, 1):
        here = results("ordinary", rank)
        assert "error" not in here, here
        for name, found in here.items():
            assert found["steps"] == STEPS, name
            assert found["compared"] >= STEPS - 1, name  # unless a rank has no example in a step


@pytest.mark.parametrize("case", WRONG)
def test_an_engine_that_becomes_wrong_on_one_rank_ends_all_of_them_before_the_release(results: Any, case: str) -> None:
    wrong = WRONG[case][0]
    here, other = results(case, wrong), results(case, 1 - wrong)
    assert here["type"] == "PreflightError", here
    assert "in step 1: expected the same" in here["error"]
    assert other["type"] == "RankLostError", other
    assert f"rank {wrong} of 2" in other["error"]
