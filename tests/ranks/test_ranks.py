"""One, two and three gloo processes: the same weights for the same key, and noise exactly once."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_dp.mechanism.noise import BLOCK
from tests.conftest import PATIENCE
from tests.mechanism.laws import FALSE_ALARM, noise_p_values
from tests.nearly import assert_nearly

ROOT = Path(__file__).parents[2]
RANKS = [1, 2, 3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("ranks")
    cases = (
        "equal,by_name,different_start,noise,zero,storm,views,styled,measured,adapted,users,secret,gan,raw,simulated"
    )
    cases += ",disagree,frozen_on_one,filtered"
    done = subprocess.run(
        [sys.executable, "-m", "tests.ranks.ranks", str(folder), cases],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]

    def load(case: str, ranks: int, rank: int | str = 0) -> dict[str, Any]:
        return torch.load(folder / f"{case}-{ranks}-{rank}.pt", weights_only=True)

    load.folder = folder
    return load


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize(
    "case",
    [
        "equal",
        "by_name",
        "different_start",
        "noise",
        "zero",
        "storm",
        "views",
        "styled",
        "measured",
        "adapted",
        "users",
        "secret",
        "gan",
        "simulated",
        "filtered",
    ],
)
def test_all_ranks_hold_the_same_weights(results: Any, case: str, ranks: int) -> None:
    first = results(case, ranks)["weights"]
    assert not torch.equal(first, results(case, ranks)["before"])
    for rank in range(1, ranks):
        assert torch.equal(first, results(case, ranks, rank)["weights"])


@pytest.mark.parametrize(
    "case",
    [
        "equal",
        "by_name",
        "different_start",
        "zero",
        "storm",
        "views",
        "styled",
        "measured",
        "adapted",
        "users",
        "simulated",
        "filtered",
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_reaches_the_weights_of_one(results: Any, case: str, ranks: int) -> None:
    torch.testing.assert_close(results(case, ranks)["weights"], results(case, 1)["weights"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ranks", RANKS)
def test_every_rank_takes_and_charges_every_step_even_without_examples(results: Any, ranks: int) -> None:
    assert {results("storm", ranks, rank)["steps"] for rank in range(ranks)} == {30}
    assert len({results("storm", ranks, rank)["epsilon"] for rank in range(ranks)}) == 1


@pytest.mark.parametrize("ranks", RANKS)
def test_the_process_that_started_the_ranks_learns_what_they_spent(results: Any, ranks: int) -> None:
    home, there = results("storm", ranks, "home"), results("storm", ranks, 0)
    assert home["steps"] == there["steps"] == 30
    assert home["epsilon"] == there["epsilon"]
    assert torch.equal(home["weights"], there["weights"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_measure_agree_on_a_size(results: Any, ranks: int) -> None:
    assert len({results("measured", ranks, rank)["physical_batch_size"] for rank in range(ranks)}) == 1


def test_both_validations_of_a_run_give_what_they_give_on_one_rank(results: Any) -> None:
    alone = results("raw", 1)["metrics"]
    assert alone["val/loss"] != alone["val/loss_raw"]
    for ranks in (2, 3):
        for rank in range(ranks):
            here = results("raw", ranks, rank)["metrics"]
            for name in ("val/loss", "val/loss_raw"):
                assert here[name] == pytest.approx(alone[name], rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3])
def test_epsilon_does_not_depend_on_the_number_of_ranks(results: Any, ranks: int) -> None:
    assert_nearly(results("equal", ranks)["epsilon"], results("equal", 1)["epsilon"])


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_zero_redundancy_optimizer_keeps_each_parameters_state_on_one_rank(results: Any, ranks: int) -> None:
    parts = [results("zero", ranks, rank)["optimizer"] for rank in range(ranks)]
    assert sum(parts) == results("zero", 1)["optimizer"]
    assert min(parts) > 0


def test_a_simulation_shares_its_smaller_batch_among_the_ranks(results: Any) -> None:
    assert [results("simulated", ranks)["plan_batch"] for ranks in RANKS] == [8, 8, 8]


def test_the_batch_of_the_loader_is_per_rank(results: Any) -> None:
    assert [results("secret", ranks)["plan_batch"] for ranks in RANKS] == [16, 32, 48]


@pytest.mark.parametrize("ranks", [*RANKS, 4])
def test_the_applied_noise_has_the_law_of_the_plan(results: Any, ranks: int) -> None:
    """The module's gradient is zero, so the weights moved by N(0, (σC/B)²) = N(0, (2·0.5/16)²), at any world size.

    The law holds for each rank's share of the coordinates and for all together, and no share repeats another's numbers.
    """
    result = results("noise", ranks)
    noise = (result["before"] - result["weights"]).double().numpy() * 16
    assert len(noise) > 3 * BLOCK
    p_values = noise_p_values(noise)
    assert min(p_values.values()) > FALSE_ALARM, p_values


@pytest.mark.parametrize(
    "scale", [np.sqrt(2.0), np.sqrt(3.0), 1 / np.sqrt(2.0), 0.5, 1.06],
    ids=["two ranks add noise", "three ranks add noise", "mean of two ranks' noises", "mean instead of sum", "6% too much"],
)  # fmt: skip
def test_a_wrong_scale_of_noise_is_rejected(results: Any, scale: float) -> None:
    result = results("noise", 2)
    noise = (result["before"] - result["weights"]).double().numpy() * 16 * scale
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(noise))
    assert not low < float(np.square(noise).sum()) < high


def test_secret_runs_differ_whatever_the_number_of_ranks(results: Any) -> None:
    assert not torch.allclose(results("secret", 1)["weights"], results("secret", 2)["weights"], atol=1e-4)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_with_their_data_in_another_order_are_refused(results: Any, ranks: int) -> None:
    """One example could sit at two indices of the one draw, and be counted twice in a step."""
    told = (results.folder / f"refusal-Regressor-{ranks}.txt").read_text()
    assert re.search(r"dataset\[\d+\] differs between rank 0 and rank [12]: expected .* random_split", told)
    assert not (results.folder / "refusal-Regressor-1.txt").exists()


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_train_different_parameters_are_refused(results: Any, ranks: int) -> None:
    told = (results.folder / f"refusal-FrozenOnOne-{ranks}.txt").read_text()
    assert re.search(r"parameters differ between rank 0 and rank 1, first at \('net\.0\.bias'.*expected", told)
