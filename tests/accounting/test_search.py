"""The cost of a search: against dp-accounting, closed forms, and the laws that any such bound obeys."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import dp_event
from dp_accounting.rdp import RdpAccountant
from scipy.stats import nbinom

from lightning_dp.accounting import Phase, epsilon_bound, rdp_epsilon, search_epsilon
from lightning_dp.accounting.rdp import ORDERS, epsilon_of_log_moments, total_log_moments
from lightning_dp.accounting.search import best_of_negative_binomial, best_of_poisson, stopping_probability
from lightning_dp.cli.main import main
from tests.nearly import assert_nearly

CIFAR = Phase(3.0, 4096 / 50000, 875)
CURVES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@pytest.mark.parametrize("random", CURVES)
@pytest.mark.parametrize("mean", [2.0, 20.0, 500.0])
@pytest.mark.parametrize("phase", [CIFAR, Phase(8.0, 1.0, 10)])
def test_it_agrees_with_another_implementation(random: Any, mean: float, phase: Phase) -> None:
    orders = [float(order) for order in ORDERS if order < 300]
    step = dp_accounting.GaussianDpEvent(phase.noise_multiplier)
    sampled = (
        step
        if phase.sampling_probability == 1
        else dp_accounting.PoissonSampledDpEvent(CIFAR.sampling_probability, step)
    )
    once = dp_accounting.SelfComposedDpEvent(sampled, phase.steps)
    oracle = RdpAccountant(orders).compose(dp_event.RepeatAndSelectDpEvent(once, mean, CURVES[random]))
    found, other = search_epsilon([phase], 1e-5, mean, random).epsilon, oracle.get_epsilon(1e-5)
    # with sampling the other one's divergences of orders below 3 are looser than the integral
    assert (1 - (2e-3 if phase.sampling_probability == 1 else 0.03)) * other <= found <= other * (1 + 1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 2.0])
def test_pure_privacy_costs_two_plus_eta_times_one_run(eta: float) -> None:
    """Papernot and Steinke 2022, Corollary 3, up to the orders that there are."""
    pure = np.full_like(ORDERS, 0.3)
    assert best_of_negative_binomial(pure, 1000.0, eta)[-1] == pytest.approx((2 + eta) * 0.3, rel=1e-3)


def test_a_gaussian_has_the_closed_form() -> None:
    """ρ-zCDP: the price is (1 + η)(2·sqrt(ρ·log(1/γ)) − ρ) for ρ ≤ log(1/γ) (Papernot and Steinke 2022, Corollary 4)."""
    rho, mean, eta = 0.1, 50.0, 1.0
    found = best_of_negative_binomial(rho * ORDERS, mean, eta) - rho * ORDERS - math.log(mean) / (ORDERS - 1)
    exact = (1 + eta) * (2 * math.sqrt(rho * math.log(mean)) - rho)
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    assert (found >= exact * (1 - 1e-12)).all(), "a coarse choice of orders never makes the bound smaller"


def test_poisson_with_a_run_that_is_nearly_pure() -> None:
    pure = np.full_like(ORDERS, 0.01)
    many = best_of_poisson(pure, 10.0)
    low = ORDERS < 2.0  # there log(1 + 1/(α − 1)) is far above 0.01, so δ is next to nothing
    np.testing.assert_allclose(many[low], 0.01 + math.log(10.0) / (ORDERS[low] - 1.0), rtol=1e-6)


@pytest.mark.parametrize("mean", [1.5, 3.0, 40.0, 1e4])
def test_the_stopping_probability_gives_the_mean_and_is_not_rounded_up(mean: float) -> None:
    for eta in (0.5, 2.0):
        gamma = stopping_probability(mean, eta)
        untruncated, none = nbinom.mean(eta, gamma), nbinom.pmf(0, eta, gamma)
        assert untruncated / (1 - none) == pytest.approx(mean, rel=1e-6)
        assert untruncated / (1 - none) >= mean
    gamma = stopping_probability(mean, 0.0)
    assert (1 / gamma - 1) / math.log(1 / gamma) == pytest.approx(mean, rel=1e-6)
    assert_nearly(stopping_probability(mean, 1.0), 1 / mean)


def test_a_fixed_number_of_runs_is_composed() -> None:
    assert_nearly(search_epsilon([CIFAR], 1e-5, 1), epsilon_bound([CIFAR], 1e-5))
    seven = epsilon_bound([Phase(CIFAR.noise_multiplier, CIFAR.sampling_probability, 7 * 875)], 1e-5)
    assert_nearly(search_epsilon([CIFAR], 1e-5, 7), seven)


@pytest.mark.parametrize("random", CURVES)
def test_a_search_costs_more_than_a_run_and_more_for_more(random: Any) -> None:
    costs = [search_epsilon([CIFAR], 1e-5, mean, random).epsilon for mean in (1.0, 2.0, 10.0, 100.0, 1e4)]
    assert costs == sorted(costs)
    assert costs[0] >= rdp_epsilon([CIFAR], 1e-5)
    assert costs[-1] < search_epsilon([CIFAR], 1e-5, 10_000).epsilon
    assert search_epsilon([], 1e-5, 10.0, random).epsilon == 0
    assert search_epsilon([Phase(0.0, 0.5, 1)], 1e-5, 10.0, random).epsilon == math.inf


def test_the_price_is_not_paid_twice_or_left_out() -> None:
    one = total_log_moments([CIFAR]) / (ORDERS - 1)
    without = epsilon_of_log_moments(one * (ORDERS - 1), 1e-5)
    with_it = search_epsilon([CIFAR], 1e-5, 20, "geometric").epsilon
    assert 2 * without < with_it < 5 * without


def statement(folder: Path, **changes: Any) -> str:
    folder.mkdir()
    numbers: dict[str, Any] = {"noise_multiplier": 3.0, "sampling_probability": 0.1, "steps": 50, "caveats": []}
    (folder / "privacy.json").write_text(json.dumps({"sampling": "Poisson", **numbers, **changes}))
    return str(folder)


def test_the_command_says_what_may_be_released(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def said(*words: str) -> str:
        main(["search", "--delta", "1e-5", *words])
        return capsys.readouterr().out

    numbers = ["--noise-multiplier", "3", "--sampling-probability", "0.08192", "--steps", "875"]
    fixed = json.loads(said("--runs", "20", *numbers, "--json"))
    drawn = json.loads(said("--runs", "20", "--random", "geometric", *numbers, "--json"))
    assert drawn["epsilon"] < fixed["epsilon"]
    assert "all of which may be released" in fixed["released"]
    assert "nothing else" in drawn["released"]
    line = said("--runs", "20", *numbers)
    assert fixed["epsilon"] <= float(line.split()[2]) <= fixed["epsilon"] * 1.01

    made = [statement(tmp_path / "a"), statement(tmp_path / "b", noise_multiplier=2.0)]
    both = json.loads(said(*made, "--json"))
    assert_nearly(both["epsilon"], epsilon_bound([Phase(3.0, 0.1, 50), Phase(2.0, 0.1, 50)], 1e-5).epsilon)
    (tmp_path / "b" / "privacy.json").rename(tmp_path / "a" / "privacy-2.json")  # two runs that shared a folder
    assert_nearly(json.loads(said(made[0], "--json"))["epsilon"], both["epsilon"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "2"], "expected --noise-multiplier"),
        (
            ["--runs", "0.5", "--noise-multiplier", "3", "--sampling-probability", "0.1", "--steps", "9"],
            "runs=0.5: expected at",
        ),
        (
            ["--runs", "2.5", "--noise-multiplier", "3", "--sampling-probability", "0.1", "--steps", "9"],
            "a whole number",
        ),
        (["nowhere"], "nowhere: expected the privacy.json of a finished run"),
        (["torn", "--runs", "3"], "expected one or the other"),
        (["torn"], "torn/privacy.json: expected the privacy.json of a finished run"),
        (["two_phases"], "expected a run with one σ and one q"),
        (["cut"], "expected a run with one σ and one q"),
    ],
)
def test_what_does_not_make_sense_is_said(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    statement(tmp_path / "two_phases", caveats=["composed of 2 phases: ..."])
    statement(tmp_path / "cut", sampling="truncated Poisson")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "privacy.json").write_text('{"epsilon": 3.0, "del')
    with pytest.raises(SystemExit):
        main(["search", "--delta", "1e-5", *words])
    assert message in capsys.readouterr().err
