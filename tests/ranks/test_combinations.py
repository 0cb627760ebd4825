"""Clipping style × views × privacy unit on two ranks: what a loop by hand comes to, which knows of no ranks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import PATIENCE
from tests.harness import EVERY, Setting, by_hand

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("combinations")
    command = [sys.executable, "-m", "tests.ranks.combinations", str(folder)]
    subprocess.run(command, check=True, cwd=ROOT, timeout=PATIENCE, capture_output=True)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_two_ranks_are_the_loop_by_hand(found: dict[str, torch.Tensor], setting: Setting) -> None:
    torch.testing.assert_close(found[str(setting)], by_hand(setting), rtol=1e-5, atol=1e-6)
