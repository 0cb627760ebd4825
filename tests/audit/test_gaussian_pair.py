"""Scores read as two Gaussians: right where they are, refused where they visibly are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lightning_dp.accounting import Phase
from lightning_dp.accounting.epsilon import epsilon_bound, gaussian_epsilon
from lightning_dp.audit.gaussian_pair import HIGHEST, pair_bound, pair_epsilon
from tests.audit.test_bound import FALSE_ALARM

DELTA = 1e-5


def sample(distance: float, spread: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    members = generator.random(canaries) < 0.5
    scores = generator.standard_normal(canaries) * np.where(members, spread, 1.0) + distance * members
    return 3.0 + 0.2 * scores, members  # their scale says nothing


@pytest.mark.parametrize(("distance", "spread"), [(0.27, 1.0), (1.6, 1.0), (1.6, 1.2), (0.5, 0.9), (0.0, 1.0)])
def test_the_bound_exceeds_the_true_epsilon_no_more_often_than_it_may(distance: float, spread: float) -> None:
    audits, level, true = 60, 0.2, pair_epsilon(distance, spread, DELTA)
    failures = 0
    for seed in range(audits):
        found = pair_bound(*sample(distance, spread, 1000, seed), DELTA, 1.0 - level)
        failures += found.epsilon is not None and found.epsilon > true + 1e-9
    assert stats.binom.sf(failures - 1, audits, level) > FALSE_ALARM


@pytest.mark.parametrize(
    ("distance", "canaries", "least"), [(0.27, 40_000, 0.85), (0.94, 40_000, 0.92), (1.6, 5000, 0.9)]
)
def test_it_is_near_to_the_true_epsilon(distance: float, canaries: int, least: float) -> None:
    true = pair_epsilon(distance, 1.0, DELTA)
    found = [pair_bound(*sample(distance, 1.0, canaries, seed), DELTA, 0.95).epsilon or 0.0 for seed in range(6)]
    assert np.mean(found) > least * true


def test_canaries_that_nothing_tells_apart_give_no_bound_worth_the_name() -> None:
    """The pitfall of an absolute value: chance in the wrong direction is no evidence in the other one."""
    for seed in range(20):
        found = pair_bound(*sample(-0.1, 1.0, 1000, seed), DELTA, 0.95)
        assert found.epsilon is None or found.epsilon < 0.1


def test_the_divergence_is_the_integral() -> None:
    x = np.linspace(-40, 40, 400_001)
    for distance, spread in ((1.0, 1.0), (1.0, 1.3), (1.0, 0.8), (0.1, 1.02)):
        epsilon = pair_epsilon(distance, spread, 1e-3)
        present, absent = stats.norm.pdf(x, distance, spread), stats.norm.pdf(x)
        ways = [
            np.trapezoid(np.maximum(one - np.exp(epsilon) * other, 0.0), x)
            for one, other in ((present, absent), (absent, present))
        ]
        assert max(ways) == pytest.approx(1e-3, rel=1e-3)
    assert pair_epsilon(1 / 1.7, 1.0, DELTA) == pytest.approx(gaussian_epsilon([Phase(1.7, 1.0, 1)], DELTA), rel=1e-6)
    assert pair_epsilon(0.0, 1.0, DELTA) == 0.0
    assert pair_epsilon(1e3, 1.0, DELTA) == HIGHEST


def test_what_is_visibly_no_gaussian_is_not_read_as_one() -> None:
    generator = np.random.default_rng(0)
    members = generator.random(5000) < 0.5
    assert pair_bound(generator.standard_cauchy(5000) + members, members, DELTA, 0.95).epsilon is None
    assert pair_bound(members.astype(float), members, DELTA, 0.95).epsilon is None
    assert pair_bound(np.arange(6.0), np.arange(6) < 3, DELTA, 0.95).epsilon is None


def test_log_likelihood_ratios_read_as_gaussians_would_exceed_the_truth_where_sums_do_not() -> None:
    """The pitfall of reading the best score as a Gaussian: it is skewed, and δ = 1e-5 is all tail."""
    sigma, q, steps, canaries = 2.4947, 0.3563, 120, 20_000
    true = epsilon_bound([Phase(sigma, q, steps)], DELTA).epsilon
    generator = np.random.default_rng(0)
    members = generator.random(canaries) < 0.5
    ratios, sums = np.zeros(canaries), np.zeros(canaries)
    for _ in range(steps):
        x = (members & (generator.random(canaries) < q)) + sigma * generator.standard_normal(canaries)
        ratios += np.log1p(q * np.expm1((2 * x - 1) / (2 * sigma**2)))
        sums += x
    found = [pair_bound(scores, members, DELTA, 0.95) for scores in (ratios, sums)]
    beyond = [pair_epsilon(one.distance, one.spread, DELTA) for one in found]
    assert beyond[0] > 1.05 * true
    assert 0.9 * true < beyond[1] < 1.03 * true
    assert found[1].epsilon is not None
    assert 0.85 * true < found[1].epsilon < true
