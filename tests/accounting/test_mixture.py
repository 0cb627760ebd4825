"""Balls in bins under correlated noise: ε against the best attack, matrices, the Gaussian and the allocation accountant."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.linalg import toeplitz

import lightning_dp.accounting.mixture as mixture_module
from lightning_dp.accounting import Ledger, Phase, epsilon_bound
from lightning_dp.accounting.amplified import amplified_lambda
from lightning_dp.accounting.calibrate import noise_for
from lightning_dp.accounting.epsilon import MOST_MECHANISMS, few, gaussian_epsilon, pool
from lightning_dp.accounting.mixture import (
    _Added,
    _mixtures,
    _Removed,
    apart,
    closed_bound,
    covariance,
    simulated_bound,
)
from lightning_dp.accounting.phase import as_known, phase_of, phase_of_numbers
from lightning_dp.accounting.pld import pld_bound
from lightning_dp.accounting.rdp import FloatArray, rdp_epsilon
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.plan.toeplitz import momentum_workload, squared_error
from tests.guarantees.mutations import caught, patched

STYLES = ("banded", "lambda", "bisr")
NONE = Correlation("banded", 100, 0.0, (1.0,))
"""Independent noise, as a strategy matrix."""


def found(style: str, steps: int = 20, bins: int = 5, momentum: float = 0.5) -> Correlation:
    return Correlation.found(style, steps=steps, momentum=momentum, groups=bins, bands=3)


def stretch(correlation: Correlation, sigma: float, bins: int = 5, blocks: int = 4, count: int = 1) -> Phase:
    return Phase(sigma, 1 / bins, count, "bins", correlation, blocks)


def modes(correlation: Correlation, bins: int, blocks: int) -> FloatArray:
    """What each bin adds to the rows of CG, ``(T, k)``, by matrices, in units of the largest norm of a column of C."""
    column = np.zeros(bins * blocks)
    column[: correlation.bands] = correlation.matrix[: bins * blocks]
    matrix = toeplitz(column, np.zeros(len(column)))
    if correlation.of_inverse:
        matrix = np.linalg.inv(matrix)
    rows = np.arange(len(column))[:, None] % bins == np.arange(bins)
    return np.asarray(matrix @ rows / correlation.column_norm)


@pytest.mark.parametrize("style", STYLES)
def test_covariances_are_those_of_matrices(style: str) -> None:
    correlation = found(style)
    m = modes(correlation, 5, 4)
    np.testing.assert_allclose(covariance(stretch(correlation, 0.7)), m.T @ m / 0.49, rtol=1e-8, atol=1e-8)
    assert as_known(stretch(correlation, 0.7)).noise_multiplier == pytest.approx(0.7 / np.linalg.norm(m[:, 0]))


def attack(m: FloatArray, sigma: float, epsilon: float, count: int = 200_000) -> list[tuple[float, float]]:
    """δ in both directions by the likelihood ratio of all rows, simulated, each with its standard error."""
    generator, answers = np.random.default_rng(1), []
    for with_it in (True, False):
        y = sigma * generator.standard_normal((count, len(m)))
        if with_it:
            y += m.T[generator.integers(m.shape[1], size=count)]
        ratio = np.mean(np.exp((y @ m - np.sum(m**2, axis=0) / 2.0) / sigma**2), axis=1)
        lost = np.maximum(1.0 - np.exp(epsilon) * (1.0 / ratio if with_it else ratio), 0.0)
        answers.append((float(np.mean(lost)), float(np.std(lost)) / math.sqrt(count)))
    return answers


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("bins", "blocks", "sigma"), [(5, 4, 2.5), (12, 2, 1.2)])
def test_the_bound_is_just_above_the_best_attack(style: str, bins: int, blocks: int, sigma: float) -> None:
    correlation, delta = found(style, bins * blocks, bins), 1e-2  # so that much of it can be simulated
    bound = epsilon_bound([stretch(correlation, sigma, bins, blocks)], delta)
    assert bound.accountant == "MC"
    for scale, above in ((1.0, True), (0.96, False)):
        lost = attack(modes(correlation, bins, blocks), sigma, bound.epsilon * scale)
        largest, error = max(lost)
        assert (largest - 4.0 * error <= delta) if above else (largest + 4.0 * error > delta)


def test_planted_blocks_that_are_forgotten_are_caught() -> None:
    def of_the_first(self: Correlation, steps: int, bins: int) -> FloatArray:
        return original(self, bins, bins)

    original = Correlation.gram
    with caught(patched((Correlation, "gram", of_the_first))):  # σ is no other test's: bounds are kept
        test_the_bound_is_just_above_the_best_attack("lambda", 5, 4, 2.4)


def test_planted_bins_without_correlation_are_caught() -> None:
    with caught(patched((mixture_module, "covariance", lambda phase: np.diag(np.diag(covariance(phase)))))):
        test_the_bound_is_just_above_the_best_attack("lambda", 5, 4, 2.3)


@pytest.mark.parametrize(("sigma", "bins", "blocks"), [(1.0, 20, 1), (2.0, 8, 6), (0.6, 50, 1)])
def test_independent_noise_agrees_with_the_allocation_accountant(sigma: float, bins: int, blocks: int) -> None:
    exact = epsilon_bound([phase_of_numbers(sigma, 1 / bins, bins * blocks, "balls_in_bins")], 1e-5)
    bound = epsilon_bound([stretch(NONE, sigma, bins, blocks)], 1e-5)
    assert (exact.accountant, bound.accountant) == ("PLD", "MC")
    assert exact.epsilon * 0.99 <= bound.epsilon <= exact.epsilon * 1.03


def test_one_bin_is_the_gaussian_mechanism() -> None:
    plan = PrivacyPlan(
        noise_multiplier=3.0, clip_norm=1.0, delta=1e-5, dataset_size=100, expected_batch_size=100, steps=10,
        sampling="balls_in_bins", noise=str(found("lambda", 10, 1)),
    )  # fmt: skip
    phase = phase_of(plan.mechanism, 10)
    assert (phase.sampling_probability, phase.steps, phase.law) == (1.0, 1, "poisson")
    assert phase.noise_multiplier == pytest.approx(3.0 / np.linalg.norm(modes(found("lambda", 10, 1), 1, 10)))
    alone, one = Phase(2.0, 1.0, 1), stretch(NONE, 1.0, 2, 1)
    both = epsilon_bound([alone, one], 1e-5)
    assert gaussian_epsilon([alone], 1e-5) < both.epsilon < gaussian_epsilon([alone, as_known(one)], 1e-5)


@pytest.mark.parametrize("style", STYLES)
def test_weights_are_within_their_bound_and_their_mean_is_what_is_lost(style: str) -> None:
    correlation = found(style)
    mixtures = _mixtures([stretch(correlation, 2.0)])
    for way, (lost, error) in zip(
        (_Removed(mixtures, 1e-2), _Added(mixtures, 1e-2)), attack(modes(correlation, 5, 4), 2.0, 2.0), strict=True
    ):
        for epsilon in (0.3, 2.0, way.closed):
            values = way.samples(epsilon)
            assert values.min() >= 0.0
            assert values.max() <= way.range(epsilon) * (1.0 + 1e-9)
            assert values.mean() <= way.range(epsilon)
        assert way.range(way.closed) == pytest.approx(1e-2)
        values = way.samples(2.0)
        assert abs(values.mean() - lost) <= 4.5 * math.hypot(error, values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("style", STYLES)
def test_bounds_in_order(style: str) -> None:
    """Simulated below closed, composed of rounds without correlation, and known; two stretches cost more than one."""
    correlation = found(style, 40, 10)
    one, two = (stretch(correlation, 1.5, 10, 4, count) for count in (1, 2))
    for phase in (one, two):
        simulated = epsilon_bound([phase], 1e-5).epsilon
        assert simulated < closed_bound([phase], 1e-5)
        assert simulated < pld_bound([phase], 1e-5) < gaussian_epsilon([as_known(phase)], 1e-5) * 1.01
        assert simulated < gaussian_epsilon([as_known(phase)], 1e-5) <= rdp_epsilon([phase], 1e-5)
    assert epsilon_bound([one], 1e-5).epsilon < epsilon_bound([two], 1e-5).epsilon
    assert epsilon_bound([one, one], 1e-5) == epsilon_bound([two], 1e-5)
    beside = epsilon_bound([one, Phase(4.0, 0.1, 20)], 1e-5)
    assert beside.accountant == "PLD"
    assert beside.epsilon > epsilon_bound([one], 1e-5).epsilon
    assert {phase.law for phase in apart(one, 1e-5)} <= {"poisson", "allocation"}


def test_gradients_that_are_not_all_alike_have_less_covariance() -> None:
    """The theorem's condition: with C ≥ 0 and ‖gₜ‖ ≤ 1 no entry of K grows, whatever the gradients are."""
    generator, correlation = np.random.default_rng(0), found("bisr")
    assert modes(correlation, 5, 4).min() >= 0.0
    whole = modes(correlation, 1, 20)  # of every step, to be taken apart
    matrix = toeplitz(np.diff(whole[:, 0], prepend=0.0), np.zeros(20))
    for _ in range(20):
        g = generator.standard_normal((20, 3))
        g /= np.linalg.norm(g, axis=1, keepdims=True)
        per_bin = [matrix @ (g * (np.arange(20)[:, None] % 5 == place)) for place in range(5)]
        gram = np.array([[np.sum(a * b) for b in per_bin] for a in per_bin])
        assert (gram <= covariance(stretch(correlation, 1.0)) + 1e-8).all()


def test_the_same_plan_has_the_same_bound_and_another_seed_hardly_another(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = stretch(found("lambda", 40, 10), 1.5, 10)
    known = gaussian_epsilon([as_known(phase)], 1e-5)
    one, again = (simulated_bound([phase], 1e-5, known) for _ in range(2))
    assert one == again
    monkeypatch.setattr(mixture_module, "SEED", 7)
    assert simulated_bound([phase], 1e-5, known) == pytest.approx(one, rel=0.01)


def test_extremes() -> None:
    correlation = found("lambda", 40, 10)
    assert epsilon_bound([stretch(correlation, 1e5, 10)], 1e-5).epsilon == 0.0
    assert epsilon_bound([stretch(correlation, 0.0, 10)], 1e-5).epsilon == math.inf
    little = [epsilon_bound([stretch(correlation, sigma, 10)], 1e-5).epsilon for sigma in (0.05, 0.2, 1.0)]
    assert sorted(little, reverse=True) == little
    assert epsilon_bound([stretch(correlation, 1.0, 10)], 0.9).epsilon == 0.0
    many = [stretch(correlation, 1.0 + i / 1000, 10) for i in range(100)]
    assert len(few(pool(many))) <= MOST_MECHANISMS
    assert all(phase.sampling_probability == 1.0 for phase in few(pool(many)))


def test_many_bins_are_bounded_by_one_class_of_them() -> None:
    correlation = found("banded", 2200, 2200)
    assert covariance(stretch(correlation, 1.0, 2200, 1)).shape == (550, 550)


def test_a_matrix_with_negative_entries_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a strategy matrix with the entry -0.5: expected no negative entry"):
        epsilon_bound([stretch(Correlation("banded", 20, 0.0, (1.0, -0.5)), 1.0)], 1e-5)


def test_calibration_reaches_its_target_and_a_part_of_a_block_counts_as_the_whole() -> None:
    plan = PrivacyPlan(
        noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000, expected_batch_size=100, steps=40,
        sampling="balls_in_bins", noise=str(found("lambda", 40, 10)),
    )  # fmt: skip
    sigma = noise_for(3.0, 1e-5, lambda s: phase_of(plan.mechanism.but(noise_multiplier=s), 40))
    ledger = Ledger(plan.but(noise_multiplier=sigma, target_epsilon=3.0))
    assert 3.0 * 0.995 <= ledger.epsilon(40).epsilon <= 3.0
    bounds = [ledger.epsilon(steps).epsilon for steps in (0, 1, 10, 11, 31)]
    assert bounds[0] == 0.0 < bounds[1] == bounds[2] < bounds[3] < bounds[4] == ledger.epsilon(40).epsilon
    assert ledger.affordable_steps == 40


def test_less_correlation_pays_where_bins_hide_each_other() -> None:
    """The λ that is found has less noise in the iterates at the same ε than that without amplification, by the simulated ε."""
    steps, bins = 60, 20
    plain = Correlation.found("lambda", steps=steps, momentum=0.9, groups=bins)
    found = Correlation("lambda", steps, 0.9, (1.0, -amplified_lambda(steps, bins, 0.9, 2.0, 1e-5)))
    assert -found.matrix[1] < -plain.matrix[1]
    noise = []
    for correlation in (found, plain):
        sigma = noise_for(2.0, 1e-5, lambda s, c=correlation: stretch(c, s, bins, 3))
        error = squared_error(np.convolve(momentum_workload(steps, 0.9), correlation.matrix)[:steps])
        noise.append(sigma * correlation.column_norm * math.sqrt(error))
    assert (
        noise[0]
        < noise[1]
        < noise_for(2.0, 1e-5, lambda s: Phase(s, 1 / bins, steps))
        * math.sqrt(squared_error(momentum_workload(steps, 0.9)))
    )
