"""The risk behind ε: against closed forms, against another accountant, and as laws of any curve."""

from __future__ import annotations

import math

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lightning_dp.accounting import Ledger, Phase, Statement, epsilon_bound
from lightning_dp.accounting import tradeoff as tradeoff_module
from lightning_dp.accounting.losses import decayed
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.risk import DELTAS, percent, risk_of
from lightning_dp.accounting.tradeoff import SMALLEST_RATE, curve_of
from lightning_dp.plan.privacy_plan import PrivacyPlan

RATES = np.array([0.001, 0.01, 0.1])


def tpr_by_dp_accounting(phase: Phase) -> np.ndarray:
    """TPR from the two laws of Google's privacy loss distributions: thresholds on the loss (Neyman and Pearson 1933)."""
    pld = privacy_loss_distribution.from_gaussian_mechanism(
        phase.noise_multiplier, sampling_prob=phase.sampling_probability
    ).self_compose(phase.steps)
    sides = [(one._probs, one._lower_loss) for one in (pld._pmf_remove.to_dense_pmf(), pld._pmf_add.to_dense_pmf())]
    found = []
    for (with_it, first), (without_it, last) in (sides, sides[::-1]):
        upper = len(with_it) + first  # loss of the last cell of P, and of Q after its sign is changed
        losses = np.arange(min(first, -last - len(without_it)), max(upper, -last) + 1)
        power = np.interp(losses, np.arange(first, upper), np.cumsum(with_it[::-1])[::-1], right=0.0)
        mirrored = np.cumsum(without_it)[::-1]
        alpha = np.interp(losses, np.arange(-last - len(without_it) + 1, -last + 1), mirrored, left=1.0, right=0.0)
        found.append(np.interp(RATES, alpha[::-1], power[::-1]))
    return np.maximum(*found)


def drawn_plans(count: int) -> list[Phase]:
    draw = np.random.default_rng(16)
    return [
        Phase(
            float(np.exp(draw.uniform(math.log(0.7), math.log(10)))),
            float(np.exp(draw.uniform(math.log(1e-3), math.log(0.5)))),
            int(np.exp(draw.uniform(0, math.log(1500)))),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("count", [5, pytest.param(50, marks=pytest.mark.nightly)])
def test_tests_agree_with_another_accountant_on_drawn_plans(count: int) -> None:
    for phase in drawn_plans(count):
        risk = risk_of([phase])
        tpr = np.array([risk.tpr_at_fpr[f"{rate:g}"] for rate in RATES])
        np.testing.assert_allclose(tpr, tpr_by_dp_accounting(phase), atol=1e-3)
        assert risk.reconstruction_at_prior == {"0.01": tpr[1], "0.1": tpr[2]}


@pytest.mark.parametrize(("sigma", "q"), [(3.6, 0.0053), (0.65, 0.0873), (2.0, 0.5), (0.8, 0.001)])
def test_one_step_has_its_closed_form(sigma: float, q: float) -> None:
    """Between N(0, σ²) and (1 - q)·N(0, σ²) + q·N(1, σ²) thresholds are the best tests, in both directions."""
    risk, x = risk_of([Phase(sigma, q, 1)]), np.linspace(-10.0, 7.0 * sigma + 1.0, 100_001)
    inner, mu = norm.sf((x - 1) / sigma) - norm.sf(x / sigma), 0.0
    for alpha, excess in ((norm.sf(x / sigma), q * inner), (norm.cdf(x / sigma) - q * inner, q * inner)):
        power = alpha + excess
        counts = (np.minimum(alpha, excess) >= SMALLEST_RATE) & (1 - power >= SMALLEST_RATE)
        mu = max(mu, float(np.max(norm.ppf(power[counts]) - norm.ppf(alpha[counts]))))
    assert mu <= risk.mu <= mu * 1.001
    advantage = q * (2 * norm.cdf(0.5 / sigma) - 1)
    assert advantage * (1 - 1e-9) <= risk.advantage <= advantage * (1 + 1e-6)
    threshold = norm.isf(0.001) * sigma
    exact = (1 - q) * 0.001 + q * norm.sf((threshold - 1) / sigma)
    assert exact * (1 - 1e-9) <= risk.tpr_at_fpr["0.001"] <= exact * 1.001


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    risk, mu = risk_of([Phase(2.0, 1.0, 3), Phase(5.0, 1.0, 10)]), math.sqrt(3 / 4 + 10 / 25)
    assert risk.mu == pytest.approx(mu, rel=1e-12)
    assert risk.mu_regret == 0
    assert risk.advantage == pytest.approx(2 * norm.cdf(mu / 2) - 1, rel=1e-6)
    for rate, tpr in risk.tpr_at_fpr.items():
        exact = norm.cdf(norm.ppf(float(rate)) + mu)
        assert exact <= tpr <= exact * (1 + 1e-4)
    for delta, epsilon in risk.epsilon_at_delta.items():
        assert epsilon == pytest.approx(
            epsilon_bound([Phase(2.0, 1.0, 3), Phase(5.0, 1.0, 10)], float(delta)).epsilon, rel=1e-4
        )


@settings(max_examples=6)
@given(sigma=st.sampled_from([0.8, 1.5, 4.0]), q=st.sampled_from([0.002, 0.05, 0.4]), steps=st.sampled_from([1, 7, 60]))
def test_no_bound_is_below_what_mu_allows_and_more_steps_never_help(sigma: float, q: float, steps: int) -> None:
    risk, more = risk_of([Phase(sigma, q, steps)]), risk_of([Phase(sigma, q, 2 * steps)])
    for rate, tpr in risk.tpr_at_fpr.items():
        assert float(rate) <= tpr <= norm.cdf(norm.ppf(float(rate)) + risk.mu) * (1 + 1e-9) + SMALLEST_RATE
        assert tpr <= more.tpr_at_fpr[rate]
    assert risk.advantage <= 2 * norm.cdf(risk.mu / 2) - 1 + SMALLEST_RATE
    assert risk.mu <= more.mu
    assert 0 <= risk.mu_regret <= 1
    curve = [risk.epsilon_at_delta[f"{delta:g}"] for delta in DELTAS]
    assert curve == sorted(curve)
    assert risk.epsilon_at_delta["1e-05"] <= epsilon_bound([Phase(sigma, q, steps)], 1e-5).epsilon + 1e-4


@pytest.mark.parametrize("phase", [Phase(2.0, 1 / 12, 4, "allocation"), Phase(1.3, 1 / 30, 1, "allocation")])
def test_blocks_have_a_risk_below_that_of_a_known_step(phase: Phase) -> None:
    risk, known = risk_of([phase]), risk_of([Phase(phase.noise_multiplier, 1.0, phase.steps)])
    assert risk.mu < known.mu
    assert all(risk.tpr_at_fpr[rate] < known.tpr_at_fpr[rate] for rate in risk.tpr_at_fpr)


def test_a_curve_of_which_only_points_are_known_gives_bounds_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = [Phase(1.5, 0.05, 60)]
    exact = risk_of(phases)

    def fails(*_: object) -> None:
        raise PrvFailureError("no grid")

    monkeypatch.setattr(tradeoff_module, "pld_curve", fails)
    curve = curve_of(phases)
    assert all(bound >= exact.tpr_at_fpr[f"{rate:g}"] for rate, bound in zip(RATES, curve.tpr(RATES), strict=True))
    assert exact.advantage <= curve.advantage < 1.5 * exact.advantage
    assert curve.mu() >= exact.mu


def test_distance_from_the_ideal_counts() -> None:
    """Everything within total variation τ: the best test gains 2τ at most, and the bound is no better than τ."""
    phases = [Phase(2.0, 0.1, 10)]
    near, ideal = risk_of(phases, 1e-3), risk_of(phases)
    assert ideal.advantage + 1e-3 <= near.advantage <= ideal.advantage + 2.001e-3
    assert near.tpr_at_fpr["0.01"] >= ideal.tpr_at_fpr["0.01"] + 1e-3
    assert near.mu > ideal.mu


def test_no_steps_no_noise_and_far_too_little_noise() -> None:
    nothing = risk_of([])
    assert (nothing.mu, nothing.advantage, nothing.tpr_at_fpr["0.1"]) == (0.0, 0.0, pytest.approx(0.1))
    for phases in ([Phase(0.0, 0.1, 1)], [Phase(0.3, 0.5, 10_000)]):
        risk = risk_of(phases)
        assert (risk.mu, risk.advantage, set(risk.tpr_at_fpr.values())) == (math.inf, 1.0, {1.0})
        assert risk.to_dict()["mu"] == "inf"


def test_the_statement_says_it_in_one_sentence_and_in_json() -> None:
    numbers = {"clip_norm": 1.0, "delta": 1e-5, "dataset_size": 1000, "expected_batch_size": 100}
    ledger = Ledger(PrivacyPlan(noise_multiplier=2.0, max_batch_size=200, unit="user", **numbers))
    for _ in range(5):
        ledger.charge()
    statement = Statement.of(ledger, randomness="secret")
    assert statement.risk == risk_of(ledger.phases, ledger.slack(5).total_variation)
    assert statement.to_dict()["risk"]["mu"] == statement.risk.mu
    right = percent(statement.risk.tpr_at_fpr["0.001"])
    assert statement.in_words == (
        "Whoever sees everything released and already suspects one user of being in the data is right at most "
        f"{right} of the time when wrong 0.1 % of the time"
    )
    assert "seed" in Statement.of(ledger, randomness="reproducible").in_words
    assert Statement.of(ledger, randomness="secret", risk=False).in_words == ""


@example([1.0], 2.3e-308)
@given(st.lists(st.floats(1e-30, 1.0), min_size=1, max_size=20), st.floats(0.0, 20.0))
def test_sums_that_decay(numbers: list[float], rate: float) -> None:
    found, expected = decayed(np.array(numbers), rate), 0.0
    for i in reversed(range(len(numbers))):
        expected = numbers[i] + math.exp(-rate) * expected
        assert found[i] == pytest.approx(expected, rel=1e-9, abs=1e-300)
