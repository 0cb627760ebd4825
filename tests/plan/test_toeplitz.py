"""Strategy matrices: what one example can do to them, held against every pattern, and how good they are, against bounds."""

from __future__ import annotations

from itertools import chain, combinations, product
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from scipy.linalg import toeplitz
from scipy.special import binom

from lightning_dp.plan.toeplitz import (
    best_banded,
    best_lambda,
    divided,
    inverse,
    inverse_square_root,
    momentum_workload,
    moves_of_groups,
    sensitivity_of_groups,
    squared_error,
)


def matrix(series: npt.ArrayLike, steps: int) -> npt.NDArray[np.float64]:
    column = np.zeros(steps)
    given = np.asarray(series)[:steps]
    column[: len(given)] = given
    return np.asarray(toeplitz(column, np.zeros(steps)))


def error(series: npt.ArrayLike, steps: int, momentum: float) -> float:
    """Root mean squared error of the iterates by matrices, for the sensitivity of one participation."""
    strategy = matrix(series, steps)
    workload = matrix(momentum_workload(steps, momentum), steps)
    moved = np.linalg.norm(strategy, axis=0).max()
    return float(np.linalg.norm(workload @ np.linalg.inv(strategy)) * moved / np.sqrt(steps))


def every_pattern(steps: int, groups: int) -> Any:
    """All sets of steps that an example of some group may take part in."""
    for group in range(groups):
        of_group = range(group, steps, groups)
        yield from chain.from_iterable(combinations(of_group, n) for n in range(1, len(of_group) + 1))


def by_brute_force(strategy: npt.NDArray[np.float64], groups: int) -> float:
    """The largest move over patterns and over gradients of one coordinate, ±1, and of three, drawn at random."""
    generator, largest = np.random.default_rng(0), 0.0
    for steps in every_pattern(len(strategy), groups):
        columns = strategy[:, list(steps)]
        for signs in product((-1.0, 1.0), repeat=len(steps)):
            largest = max(largest, float(np.linalg.norm(columns @ np.array(signs))))
        rows = generator.normal(size=(len(steps), 3))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        largest = max(largest, float(np.linalg.norm(columns @ rows)))
    return largest


STRATEGIES = {
    "banded": (best_banded(7, 2, 0.9), (2, 3, 7)),
    "banded, with signs that do not meet": ((1.0, -0.7), (2, 3)),
    "lambda": (0.9 ** np.arange(7), (1, 2, 3, 7)),
    "bisr": (inverse(inverse_square_root(3, 0.5), 7), (1, 2, 3, 7)),
    "one that grows": ((0.1, 0.5, 1.0), (1, 2, 3)),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_sensitivity_is_that_of_the_worst_pattern(name: str) -> None:
    series, every = STRATEGIES[name]
    for groups in every:
        found = sensitivity_of_groups(np.array(series), 7, groups)
        assert found == pytest.approx(by_brute_force(matrix(series, 7), groups), rel=1e-12)


def test_signs_that_meet_are_refused_since_the_formula_would_be_too_small() -> None:
    with pytest.raises(ValueError, match=r"with the entry -0\.7 and more than 1 bands: expected no negative entry"):
        sensitivity_of_groups(np.array([1.0, -0.7]), 7, 1)
    assert by_brute_force(matrix((1.0, -0.7), 7), 1) > np.linalg.norm(matrix((1.0, -0.7), 7).sum(1))


@pytest.mark.parametrize("groups", [1, 3, 10])
def test_published_sensitivities(groups: int) -> None:
    """C = A counts, all ones: jax_privacy's test of it (Σ over rows of the squared participations so far)."""
    rows = np.arange(10) // groups + 1
    assert sensitivity_of_groups(np.ones(10), 10, groups) ** 2 == pytest.approx(float(rows @ rows))
    geometric = sensitivity_of_groups(0.5 ** np.arange(10), 10, 10) ** 2  # of λ, taking part once
    assert geometric == pytest.approx((1 - 0.5**20) / (1 - 0.25))


def test_published_coefficients_of_the_inverse_square_root() -> None:
    """Fichtenberger, Henzinger, Upadhyay 2023: A^½ has C(2k, k)/4ᵏ; its inverse has -C(2k, k)/4ᵏ/(2k - 1)."""
    k = np.arange(12)
    assert inverse_square_root(12, 0.0) == pytest.approx(-binom(2 * k, k) / 4.0**k / (2 * k - 1))
    assert inverse(inverse_square_root(12, 0.0), 12) == pytest.approx(binom(2 * k, k) / 4.0**k)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_with_as_many_bands_as_steps_it_is_the_inverse_square_root_of_the_workload(momentum: float) -> None:
    root = matrix(inverse_square_root(20, momentum), 20)
    assert np.linalg.inv(root @ root) == pytest.approx(matrix(momentum_workload(20, momentum), 20))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_its_inverse_never_grows_or_turns_negative_so_that_its_sensitivity_is_exact(momentum: float) -> None:
    for bands in (2, 3, 8, 32):
        series = inverse(inverse_square_root(bands, momentum), 400)
        assert series.min() >= 0
        assert np.diff(series).max() <= 1e-15


def test_the_workload_is_what_momentum_does_to_the_weights() -> None:
    velocity, weights, gradients = 0.0, [], np.random.default_rng(0).normal(size=8)
    where = 0.0
    for gradient in gradients:
        velocity = 0.9 * velocity + gradient
        where += velocity
        weights.append(where)
    assert matrix(momentum_workload(8, 0.9), 8) @ gradients == pytest.approx(np.array(weights))


def test_division_is_that_of_matrices() -> None:
    series, of = np.array([2.0, -0.5, 0.3]), np.random.default_rng(0).normal(size=6)
    assert divided(of, series) == pytest.approx(np.linalg.solve(matrix(series, 6), matrix(of, 6))[:, 0])


@pytest.mark.parametrize(("bands", "momentum"), [(2, 0.0), (4, 0.9), (8, 0.9), (16, 0.5)])
def test_no_banded_strategy_nearby_is_better_and_its_columns_are_of_length_one(bands: int, momentum: float) -> None:
    steps, best = 60, np.array(best_banded(60, bands, momentum))
    least, generator = error(best, steps, momentum), np.random.default_rng(0)
    assert np.linalg.norm(best) == pytest.approx(1.0, rel=1e-9)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            assert error(best + size * generator.normal(size=bands), steps, momentum) >= least * (1 - 1e-8)


def test_more_bands_are_better_down_to_the_bound_that_nothing_beats() -> None:
    """For one participation no factorization has a root mean squared error below ‖A‖_*/T (Henzinger et al. 2023)."""
    steps = 64
    bound = np.linalg.svd(matrix(np.ones(steps), steps), compute_uv=False).sum() / steps
    errors = [error(best_banded(steps, bands, 0.0), steps, 0.0) / bound for bands in (1, 2, 4, 8, 64)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2
    assert 1 <= errors[-1] < 1.1  # a Toeplitz matrix pays for its last columns, which few rows are left of


def test_lambda_is_the_best_of_a_grid() -> None:
    def worth(share: float) -> float:
        strategy = matrix(share ** np.arange(80), 80)
        workload = matrix(momentum_workload(80, 0.9), 80)
        moved = strategy[:, ::20].sum(1)
        return float(np.linalg.norm(workload @ np.linalg.inv(strategy)) * np.linalg.norm(moved))

    best = best_lambda(80, 20, 0.9)
    assert 0.5 < best < 1
    assert worth(best) <= min(worth(share) for share in np.linspace(0.0, 0.99, 100)) * (1 + 1e-9)


def test_the_error_of_lambda_is_the_closed_one() -> None:
    """A·C⁻¹ has ones on its diagonal and 1 - λ below: T + (1 - λ)² T(T - 1)/2 in all."""
    noise = np.convolve(np.ones(50), [1.0, -0.7])[:50]
    assert squared_error(noise) == pytest.approx((50 + 0.3**2 * 50 * 49 / 2) / 50)


def test_a_part_of_the_run_moves_as_much_as_its_rows() -> None:
    series = inverse(inverse_square_root(3, 0.5), 7)
    for steps in range(1, 8):
        assert moves_of_groups(series, 7, 3)[steps - 1] == pytest.approx(
            by_brute_force(matrix(series, 7)[:steps, :steps], 3)
        )
