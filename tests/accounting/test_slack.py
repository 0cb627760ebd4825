"""What cut draws and discrete noise take from δ: probabilities and divergences against exact sums, and a worst case."""

from __future__ import annotations

import doctest
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, norm

import lightning_dp.accounting.reserve
import lightning_dp.accounting.slack
from lightning_dp.accounting import (
    Ledger,
    Phase,
    Slack,
    Statement,
    check_slack_is_affordable,
    epsilon_bound,
    rdp_epsilon,
)
from lightning_dp.accounting.epsilon import EpsilonCurve, few
from lightning_dp.accounting.phase import Seldom, phase_of
from lightning_dp.accounting.pld import pld_delta
from lightning_dp.accounting.reserve import SHARES, ReservedCurve
from lightning_dp.accounting.slack import (
    discretisation_divergence,
    smallest_max_batch_size,
    truncation_probability,
)
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests.nearly import assert_nearly


def plan(**changes: Any) -> PrivacyPlan:
    numbers: dict[str, Any] = {
        "noise_multiplier": 2.0,
        "clip_norm": 1.0,
        "delta": 1e-5,
        "dataset_size": 1000,
        "expected_batch_size": 100,
        "steps": 50,
    }
    return PrivacyPlan(**{**numbers, **changes})


@given(
    examples=st.integers(1, 40), q=st.fractions(Fraction(1, 1000), 1, max_denominator=1000), bound=st.integers(1, 45)
)
def test_the_probability_of_a_cut_is_that_of_the_larger_neighbour(examples: int, q: Fraction, bound: int) -> None:
    found, n, exact = truncation_probability(examples, float(q), bound), examples + 1, Fraction(0)
    for size in range(bound + 1, n + 1):
        exact += math.comb(n, size) * q**size * (1 - q) ** (n - size)
    assert found == pytest.approx(float(exact), rel=1e-8, abs=1e-300)
    assert found >= float(exact) * (1 - 1e-12)


@given(
    examples=st.integers(1, 10**6),
    q=st.floats(1e-6, 1.0),
    probability=st.sampled_from([1e-30, 1e-12, 1e-3, 0.5]),
)
def test_the_smallest_bound_holds_and_one_less_does_not(examples: int, q: float, probability: float) -> None:
    bound = smallest_max_batch_size(examples, q, probability)
    assert truncation_probability(examples, q, bound) <= probability
    assert bound == 1 or truncation_probability(examples, q, bound - 1) > probability


@pytest.mark.parametrize("scale", [1.0, 1.3, 2.0, 4.5, 10.0])
def test_discrete_and_rounded_gaussian_noise_are_as_close_as_proven(scale: float) -> None:
    k = np.arange(-int(20 * scale), int(20 * scale) + 1)
    weight = np.exp(-(k**2) / (2 * scale**2))
    discrete = weight / math.fsum(weight)
    above = norm.sf((np.abs(k) - 0.5) / scale) - norm.sf((np.abs(k) + 0.5) / scale)
    rounded = np.where(k == 0, norm.cdf(0.5 / scale) - norm.cdf(-0.5 / scale), above)
    kept = discrete > 1e-200
    exact = math.fsum((discrete * np.log(discrete / rounded, where=kept, out=np.zeros_like(discrete)))[kept])
    assert exact <= discretisation_divergence(scale, 1)
    assert exact == pytest.approx(1 / (576 * scale**4), rel=0.2, abs=3e-16)  # the bound is an order of magnitude above
    tau = 0.5 * math.fsum(np.abs(discrete - rounded))
    assert tau <= Slack(divergence=discretisation_divergence(scale, 1)).total_variation


def test_less_than_a_unit_of_noise_has_no_bound() -> None:
    with pytest.raises(ValueError, match=r"scale=0.5: expected discrete noise"):
        discretisation_divergence(0.5, 3)


def exact_delta_of_cut_draws(others: int, q: float, bound: int, sigma: float, epsilon: float) -> tuple[float, float]:
    """δ at ``epsilon`` of one step on one example of value 1 among ``others`` of value -1, in both directions, and exact.

    The example enters with probability q and then stays in a cut draw with probability bound / size, in which case it has
    displaced another: with it the sum is up to 2 larger. That is what cutting costs.
    """

    def mixture(present: bool) -> dict[int, float]:
        chance: dict[int, float] = {}
        for size in range(others + 1):
            p = math.comb(others, size) * q**size * (1 - q) ** (others - size)
            cases = [(-min(size, bound), p * (1 - q * present))]
            if present:
                stays = min(1.0, bound / (size + 1))
                cases += [
                    (1 - min(size, bound - 1), p * q * stays),
                    (-min(size, bound), p * q * (1 - stays)),
                ]
            for mean, weight in cases:
                chance[mean] = chance.get(mean, 0.0) + weight
        return chance

    x = np.linspace(-others - 12 * sigma, 2 + 12 * sigma, 200_001)
    density = [
        sum(weight * norm.pdf(x, mean, sigma) for mean, weight in mixture(present).items()) for present in (False, True)
    ]
    step = float(x[1] - x[0])
    excess = [np.maximum(0, density[i] - math.exp(epsilon) * density[1 - i]).sum() * step for i in (0, 1)]
    return float(excess[0]), float(excess[1])


def exact_delta_without_cuts(q: float, sigma: float, epsilon: float) -> float:
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 200_001)
    pair = [norm.pdf(x, 0, sigma), (1 - q) * norm.pdf(x, 0, sigma) + q * norm.pdf(x, 1, sigma)]
    step = float(x[1] - x[0])
    return max(float(np.maximum(0, pair[i] - math.exp(epsilon) * pair[1 - i]).sum() * step) for i in (0, 1))


@pytest.mark.parametrize(("others", "q", "bound"), [(6, 0.3, 3), (10, 0.1, 4), (3, 0.95, 3), (2, 0.99, 2)])
@pytest.mark.parametrize("sigma", [0.4, 1.0])
def test_the_slack_covers_what_cutting_costs_in_a_worst_case(others: int, q: float, bound: int, sigma: float) -> None:
    tau = Slack(truncation_probability(others, q, bound))
    numbers = {"noise_multiplier": sigma, "dataset_size": others, "expected_batch_size": others * q, "clip_norm": 1.0}
    phase = phase_of(Mechanism.of(**numbers, max_batch_size=bound), 1)
    dearer = 0
    for epsilon in (0.1, 1.0, 3.0, 6.0):
        ideal = exact_delta_without_cuts(q, sigma, epsilon)
        exact = max(exact_delta_of_cut_draws(others, q, bound, sigma, epsilon))
        assert exact <= ideal + tau.costs(epsilon) + 1e-12
        assert exact <= pld_delta([phase], epsilon, 1e-9) + 1e-9 <= ideal + tau.costs(epsilon) + 1e-6
        dearer += exact > ideal + 1e-9
    assert dearer or q < 0.5  # where nearly all draws are cut it shows: without a share of δ the bound would be wrong


@pytest.mark.parametrize("truncation", [1e-13, 1e-10, 1e-8])
def test_epsilon_is_the_accountants_at_what_is_left_of_delta(truncation: float) -> None:
    each = Slack(truncation)
    curve = ReservedCurve((), Slack(), plan().mechanism, 1e-5, each)
    for steps in (1, 20, 50):
        bound = curve.at(steps)
        spent = (each * steps).costs(bound.epsilon)
        share = next(share for share in SHARES if spent <= share * 1e-5)
        assert_nearly(bound, EpsilonCurve((), 2.0, 0.1, 1e-5 * (1 - share)).at(steps))
        assert bound.epsilon > EpsilonCurve((), 2.0, 0.1, 1e-5).at(steps).epsilon
    assert curve.at(0).epsilon == 0
    assert curve.rdp_steps(1.5) <= 50 * 1.5
    assert curve.at(int(curve.rdp_steps(1.5))).epsilon <= 1.5


def test_slack_that_delta_cannot_pay_for_is_no_privacy() -> None:
    bound = ReservedCurve((), Slack(), plan().mechanism, 1e-5, Slack(1e-6)).at(50)
    assert bound.epsilon == math.inf
    assert "δ cannot pay" in str(bound.note)
    assert Slack(1e-300).costs(1e4) == math.inf
    assert Slack().costs(1e4) == 0


def test_cut_draws_stay_in_the_ledger_and_are_paid_for() -> None:
    first = Ledger(plan(max_batch_size=130, steps=20))
    for _ in range(20):
        first.charge()
    second = Ledger.resume(plan(max_batch_size=140), first.state_dict())
    for _ in range(30):
        second.charge()
    cut = [float(binom.sf(bound - 1, 1000, 0.1)) for bound in (130, 140)]
    assert [phase.steps for phase in second.phases] == [20, 30]
    for phase, probability in zip(second.phases, cut, strict=True):
        assert phase.seldom == Seldom(pytest.approx(probability, rel=1e-6), 1.0, 0.1)
    assert second.slack(50) == Slack()
    assert any("bound on a step's draw changed during training from 130 to 140" in note for note in second.notes)
    third = Ledger.resume(plan(), second.state_dict())
    for steps in (0, 10, 20, 40, 50):
        assert third.epsilon(steps).epsilon == pytest.approx(second.epsilon(steps).epsilon, rel=1e-3)
    plain = Ledger.resume(plan(), {**first.state_dict(), "phases": [
        {**phase, "max_batch_size": None} for phase in second.state_dict()["phases"]]})  # fmt: skip
    assert third.epsilon().epsilon > plain.epsilon().epsilon * 1.0001
    assert third.phases[0].seldom is not None
    assert rdp_epsilon(third.phases, 1e-5) > rdp_epsilon(plain.phases, 1e-5)
    assert "truncated Poisson sampling" in str(Statement.of(second, randomness="secret"))
    assert "at most 140 examples a step" in str(Statement.of(second, randomness="secret"))


def test_draws_that_are_nearly_always_cut_have_a_bound_too() -> None:
    epsilons = [Ledger(plan(max_batch_size=bound)).epsilon(50).epsilon for bound in (None, 150, 120, 105, 60)]
    assert epsilons == sorted(epsilons)
    twice = epsilon_bound([Phase(1.0, 0.1, 50)], 1e-5).epsilon
    assert epsilons[-1] == pytest.approx(twice, rel=1e-3)


def test_phases_with_cut_draws_that_are_put_together_lose_no_less() -> None:
    phases = [Phase(2.0 + i / 100, 0.1, 2, seldom=Seldom(1e-3 * (i % 3 + 1), 1.0 + i / 200, 0.1)) for i in range(7)]
    (together,) = few(tuple(phases), 1)
    assert (together.steps, together.seldom) == (14, Seldom(3e-3, 1.0, 0.1))
    assert epsilon_bound([together], 1e-5).epsilon > epsilon_bound(phases, 1e-5).epsilon


def test_discrete_noise_is_paid_for_at_every_step() -> None:
    fine = {"resolution": 2**20, "coordinates": 10**6}
    ledger = Ledger(plan(**fine))
    for _ in range(50):
        ledger.charge()
    each = discretisation_divergence(2.0 * 2**20, 10**6)
    assert ledger.slack(50).divergence == pytest.approx(50 * each, rel=1e-9, abs=0)
    tau = math.sqrt(50 * each / 2)
    bound = ledger.epsilon()
    share = next(share for share in SHARES[1:] if (1 + math.exp(bound.epsilon)) * tau <= share * 1e-5)
    assert_nearly(bound, EpsilonCurve((), 2.0, 0.1, 1e-5 * (1 - share)).at(50))
    assert bound.epsilon > EpsilonCurve((), 2.0, 0.1, 1e-5).at(50).epsilon


@pytest.mark.parametrize("changes", [{"target_epsilon": 3.0}, {}, {"steps": None}])
def test_a_bound_that_cuts_too_often_names_one_that_does_not(changes: dict[str, Any]) -> None:
    """With Poisson sampling any bound is accounted for; with other sampling δ has to pay for it."""
    blocks = {"sampling": "random_allocation", **changes}
    with pytest.raises(ValueError, match=r"max_batch_size=110 .*expected at least (\d+)\..*leave it out") as refusal:
        check_slack_is_affordable(Ledger(plan(max_batch_size=110, **blocks)))
    named = int(str(refusal.value).split("expected at least ")[1].split(".")[0])
    assert 100 < named < 250
    check_slack_is_affordable(Ledger(plan(max_batch_size=named, **blocks)))
    check_slack_is_affordable(Ledger(plan(max_batch_size=110, **changes)))


def test_a_grid_too_coarse_for_epsilon_is_refused() -> None:
    coarse = plan(noise_multiplier=0.7, resolution=2**10, coordinates=10**6)
    with pytest.raises(ValueError, match=r"secure=True with noise_multiplier=0.7: .*Expected more noise"):
        check_slack_is_affordable(Ledger(coarse))
    check_slack_is_affordable(Ledger(coarse.but(resolution=2**30)))


@pytest.mark.parametrize("module", [lightning_dp.accounting.slack, lightning_dp.accounting.reserve])
def test_the_examples_of_the_documentation_hold(module: Any) -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
