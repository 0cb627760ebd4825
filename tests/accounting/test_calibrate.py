"""σ from a target ε: never overspent, hardly underspent."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, Phase, epsilon_bound, noise_multiplier_for
from lightning_dp.plan.privacy_plan import PrivacyPlan

PLANS = [
    (8.0, 1e-5, 4096 / 50000, 875, ()),
    (1.0, 1e-5, 4096 / 50000, 875, ()),
    (2.0, 1e-5, 256 / 1437, 120, ()),
    (0.01, 1e-5, 0.01, 100, ()),
    (60.0, 1e-5, 0.01, 100, ()),
    (3.0, 1e-5, 1.0, 100, ()),
    (4.0, 1e-15, 0.05, 100, ()),
    (8.0, 1e-5, 0.08, 300, (Phase(2.0, 0.08, 200),)),
    (8.0, 1e-5, 0.08, 300, (Phase(2.0, 0.04, 200), Phase(5.0, 1.0, 2))),
    (8.0, 1e-5, 0.08, 1, (Phase(2.0, 0.04, 200),)),
]


@pytest.mark.parametrize(("epsilon", "delta", "q", "steps", "history"), PLANS)
def test_spends_the_target_and_no_more(
    epsilon: float, delta: float, q: float, steps: int, history: tuple[Phase, ...]
) -> None:
    sigma = noise_multiplier_for(epsilon, delta, q, steps, history)
    spent = epsilon_bound([*history, Phase(sigma, q, steps)], delta).epsilon
    assert 0.99 * epsilon <= spent <= epsilon
    assert epsilon_bound([*history, Phase(sigma * 0.998, q, steps)], delta).epsilon > epsilon


def test_the_imagenet_plan() -> None:
    q, steps = 16384 / 1281167, 72000
    sigma = noise_multiplier_for(8.0, 8e-7, q, steps)
    assert 2.3 < sigma < 2.5
    assert 7.99 < epsilon_bound([Phase(sigma, q, steps)], 8e-7).epsilon <= 8.0


@settings(max_examples=6)
@given(
    epsilon=st.sampled_from([0.3, 1.0, 4.0, 12.0]),
    q=st.sampled_from([0.001, 0.03, 0.3]),
    steps=st.sampled_from([1, 40, 700]),
)
def test_more_budget_needs_less_noise(epsilon: float, q: float, steps: int) -> None:
    sigma = noise_multiplier_for(epsilon, 1e-6, q, steps)
    spent = epsilon_bound([Phase(sigma, q, steps)], 1e-6).epsilon
    assert 0.98 * epsilon <= spent <= epsilon
    assert noise_multiplier_for(epsilon * 1.5, 1e-6, q, steps) < sigma
    assert noise_multiplier_for(epsilon, 1e-6, q, steps * 2) > sigma


def test_a_ledger_affords_exactly_what_was_calibrated() -> None:
    dataset, batch, steps = 1437, 256.0, 120
    sigma = noise_multiplier_for(8.0, 1e-5, batch / dataset, steps)
    plan = PrivacyPlan(
        noise_multiplier=sigma,
        clip_norm=1.0,
        delta=1e-5,
        dataset_size=dataset,
        expected_batch_size=batch,
        steps=steps,
        target_epsilon=8.0,
    )
    ledger = Ledger(plan)
    for _ in range(steps):
        ledger.charge()
    assert ledger.epsilon().epsilon <= 8.0
    assert ledger.affordable_steps == steps


def test_targets_out_of_reach() -> None:
    with pytest.raises(ValueError, match=r"epsilon=1 .* 1000 steps already taken have spent .* Raise epsilon"):
        noise_multiplier_for(1.0, 1e-5, 0.1, 100, [Phase(0.5, 0.1, 1000)])
    with pytest.raises(ValueError, match=r"spent ε = inf"):
        noise_multiplier_for(1.0, 1e-5, 0.1, 100, [Phase(0.0, 0.1, 1)])
    with pytest.raises(ValueError, match=r"noise multiplier up to 1e\+06 reaches, but none does\. Raise epsilon"):
        noise_multiplier_for(1e-9, 1e-30, 1.0, 10**9)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((0.0, 1e-5, 0.1, 10), "epsilon"),
        ((float("inf"), 1e-5, 0.1, 10), "epsilon"),
        ((1.0, 0.0, 0.1, 10), "delta"),
        ((1.0, 1e-5, 0.0, 10), "sampling_probability"),
        ((1.0, 1e-5, 1.5, 10), "sampling_probability"),
        ((1.0, 1e-5, 0.1, 0), "steps"),
    ],
)
def test_arguments_outside_their_range(arguments: tuple[float, float, float, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        noise_multiplier_for(*arguments)
