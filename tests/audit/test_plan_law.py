"""The simulated law of a plan: its draws, its noise, and the noise that scores refute."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import ndtr

from lightning_dp.accounting.phase import phase_of
from lightning_dp.accounting.pld import pld_delta
from lightning_dp.audit.plan_law import _draws, crossing, noise_factor, separation, simulated, told_more_than
from lightning_dp.plan.correlation import Correlation
from tests.audit.test_bound import FALSE_ALARM
from tests.mechanism.laws import plan

SCHEMES = ("poisson", "cyclic_poisson", "random_allocation", "balls_in_bins")


def drawn(sampling: str, steps: int) -> np.ndarray:
    noise = str(Correlation.found("banded", steps=12, momentum=0.9, groups=4, bands=3))
    given = plan(
        sampling=sampling, expected_batch_size=10, noise=noise if sampling == "cyclic_poisson" else "independent"
    )
    draws = _draws(given.mechanism, np.ones(4000, dtype=bool), np.random.default_rng(0))
    return np.array([next(draws) for _ in range(steps)])


@pytest.mark.parametrize("sampling", SCHEMES)
def test_canaries_are_drawn_as_the_scheme_says(sampling: str) -> None:
    found, q = drawn(sampling, 12), 0.25
    assert stats.binomtest(int(found.sum()), found.size, q).pvalue > FALSE_ALARM
    turns = found.reshape(3, 4, -1).sum(1)
    if sampling in ("random_allocation", "balls_in_bins"):
        assert np.all(turns == 1)
        same = np.mean(found[:4] == found[4:8])
        assert same == 1.0 if sampling == "balls_in_bins" else same < 0.9
    elif sampling == "cyclic_poisson":
        assert not np.any(found[0] & found[1])  # another group's turn
        assert np.any(found[0] & found[3])
    else:
        assert np.any(found[0] & found[1])


def test_those_that_are_not_in_are_never_drawn() -> None:
    draws = _draws(plan().mechanism, np.zeros(100, dtype=bool), np.random.default_rng(0))
    assert not any(next(draws).any() for _ in range(5))


@pytest.mark.parametrize("sampling", ["poisson", "random_allocation", "balls_in_bins"])
def test_no_score_tells_canaries_apart_better_than_the_accountant_allows(sampling: str) -> None:
    given = plan(sampling=sampling, expected_batch_size=10)
    allowed = pld_delta([phase_of(given.mechanism, 8)], 0.0)
    present, absent = simulated(given, 8, canaries=40_000)
    advantage = max(np.mean(present > t) - np.mean(absent > t) for t in np.quantile(absent, np.linspace(0.1, 0.9, 33)))
    assert 0.8 * allowed < advantage < allowed + 0.02


def test_at_full_batch_it_is_two_gaussians() -> None:
    given = plan(noise_multiplier=2.0, expected_batch_size=40)
    area, variance = separation(*simulated(given, 9, canaries=40_000))
    assert area == pytest.approx(float(ndtr(1.5 / np.sqrt(2))), abs=5 * np.sqrt(variance))
    half, _ = separation(*simulated(given, 9, 2.0, canaries=40_000))
    assert half == pytest.approx(float(ndtr(0.75 / np.sqrt(2))), abs=0.02)


def test_separation_is_the_share_of_pairs_in_order_and_its_variance_that_of_many_samples() -> None:
    generator = np.random.default_rng(0)
    pairs = [(generator.standard_normal(60) + 1.0, generator.standard_normal(40)) for _ in range(2000)]
    found = [separation(*pair) for pair in pairs]
    present, absent = pairs[0]
    assert found[0][0] == pytest.approx(np.mean(present[:, None] > absent[None, :]))
    assert np.mean([variance for _, variance in found]) == pytest.approx(np.var([area for area, _ in found]), rel=0.1)


def scores(factor: float, canaries: int, seed: int, steps: int = 3) -> tuple[np.ndarray, np.ndarray]:
    present, absent = simulated(plan(noise_multiplier=1.0), steps, factor, seed=1000 + seed, canaries=canaries)
    return np.concatenate([present, absent]), np.arange(canaries) < canaries // 2


def test_the_plan_is_refuted_no_more_often_than_it_may_and_half_the_noise_is_found() -> None:
    given, audits, level = plan(noise_multiplier=1.0), 120, 0.2
    failures = sum(told_more_than(1.0, *scores(1.0, 600, seed), given, 3, level) for seed in range(audits))
    found = sum(told_more_than(1.0, *scores(0.5, 600, seed), given, 3, level) for seed in range(20))
    assert stats.binom.sf(failures - 1, audits, level) > FALSE_ALARM
    assert failures > 0  # it has power to the last
    assert found > 15


def test_the_factor_found_is_near_to_the_noise_that_was_there() -> None:
    given = plan(noise_multiplier=1.0)
    for factor in (0.4, 1.0, 1.5):
        found = noise_factor(*scores(factor, 20_000, 1), given, 3, 0.95)
        assert found is not None
        assert factor < found < 1.25 * factor
    generator = np.random.default_rng(0)
    assert noise_factor(generator.standard_normal(400), np.arange(400) < 200, given, 3, 0.999) is None


def test_where_factors_begin_to_be_refuted() -> None:
    for factor in (0.2, 0.9, 1.05, 1.7, 20.0):
        assert crossing(lambda one, factor=factor: one > factor) == pytest.approx(factor, rel=2e-3)
    assert crossing(lambda one: False) is None
    assert crossing(lambda one: True) == 1 / 16
