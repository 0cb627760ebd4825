"""What the ranks compare holds for every loader of a run, and a rank that is lost is named whenever it is lost."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks.every_loader import EARLY, EPOCHS, LOADERS

ROOT = Path(__file__).parents[2]
AN_EPOCH = 3
"""Steps of 8 × 2 of 48 examples."""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("every_loader")
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.every_loader", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    def load(case: str, rank: int = 0) -> dict[str, Any]:
        return torch.load(folder / f"{case}-2-{rank}.pt", weights_only=True)

    return load


REFUSED = {
    "split anew on each rank": (
        AN_EPOCH,
        r"dataset\[\d+\] differs between rank 0 and rank 1: .*numpy.*fixed seed.*by the epoch",
    ),
    "split on one rank, at the start": (0, r"dataset\[\d+\] differs between rank 0 and rank 1"),
    "split in place": (
        AN_EPOCH,
        r"dataset=Subset has other indices than when its loader was made: .*reload_dataloaders",
    ),
    "two are swapped": (0, "the indices of dataset=Subset differ between rank 0 and rank 1"),
    "a generator of its own, in another order": (0, r"dataset\[\d+\] differs between rank 0 and rank 1"),
}
TRAINS = ["split anew alike", "a generator of its own", "now and then", "all at random"]


@pytest.mark.parametrize("name", REFUSED)
def test_data_that_a_rank_orders_for_itself_are_refused_at_the_loader_that_brings_them(results: Any, name: str) -> None:
    """Otherwise one example could be drawn twice in a step, and move the sum by twice the clip norm."""
    charged, text = REFUSED[name]
    for rank in range(2):
        here = results("all", rank)[name]
        assert re.search(text, str(here["error"])), here["error"]
        assert here["charged"] == charged


@pytest.mark.parametrize("name", TRAINS)
def test_data_in_the_same_order_train_however_random_each_example_is(results: Any, name: str) -> None:
    for rank in range(2):
        here = results("all", rank)[name]
        assert here["error"] is None
        assert here["charged"] == EPOCHS * AN_EPOCH
    assert bool(results("all")[name]["said"]) == (name == "all at random")


def test_an_example_is_on_one_rank_in_a_step_also_after_the_data_are_loaded_anew(results: Any) -> None:
    of_rank = [results("all", rank)["split anew alike"]["sampled"] for rank in range(2)]
    steps = list(zip(*of_rank, strict=True))[1:]  # in the first step examples are also looked at, on every rank
    assert len(steps) > 2
    for mine, theirs in steps:
        assert len({*mine, *theirs}) == len(mine) + len(theirs)


def test_a_dataset_that_raises_on_one_rank_stops_both(results: Any) -> None:
    assert re.match("PreflightError: rank 1 stopped: IndexError", results("all", 0)["raises on one rank"]["error"])
    assert results("all", 1)["raises on one rank"]["error"].startswith("IndexError")


@pytest.mark.parametrize("case", LOADERS, ids=str)
def test_two_ranks_take_the_steps_that_they_would_take_without_privacy(results: Any, case: Any) -> None:
    for rank in range(2):
        plain, private = results("epochs", rank)[" ".join(map(str, case))]
        assert plain == private
        assert private[0] == private[2] == 2 * private[1]


@pytest.mark.parametrize("hook", EARLY)
def test_a_rank_that_is_lost_before_a_step_is_released_is_named(results: Any, hook: str) -> None:
    """Under FSDP in the step itself, where shards are brought together before anything is charged."""
    here = results(hook)
    assert here["type"] == "RankLostError", here
    assert re.match(
        r"rank 1 of 2 did not answer within 3 s after a collective call outside a step's release", here["error"]
    )
    assert "What was released before is charged, and nothing else" in here["error"]
    assert here["charged"] == 0
