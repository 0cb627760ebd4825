"""Lower-triangular Toeplitz matrices by their first column: what noise correlated over the steps is made with."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Series = npt.NDArray[np.float64]
"""The first column of a lower-triangular Toeplitz matrix; what is missing at its end is zero."""

LONGEST_SEARCH = 2**13
"""Strategies are searched for at most so many steps: beyond, the best one hardly changes. It has to do with utility alone."""

_TOO_LARGE = 1e100

_DIGITS = 12
"""Found coefficients are rounded to so many decimals, so that they read well. What they cost is computed from the rounded."""


def check_no_negative_entry(series: Series) -> None:
    """Raise ``ValueError`` where C has a negative entry, so that an example's turns may take from each other."""
    if series.min() < -1e-13 * abs(series[0]):
        raise ValueError(
            f"a strategy matrix with the entry {series.min():.3g}: expected no negative entry, for what an example's turns "
            "add up to to be bounded by gradients that are all alike. Use other bands or momentum."
        )


def momentum_workload(steps: int, momentum: float) -> Series:
    """What each noisy gradient adds to the later iterates of SGD with momentum β and a learning rate of 1, ``(T,)``.

    A gradient has moved the weights k steps later by aₖ = 1 + β + … + βᵏ of itself.

    Example:
        >>> momentum_workload(3, 0.5)
        array([1.  , 1.5 , 1.75])

    Source: Choquette-Choo et al. 2023 (arXiv 2306.08153); Kalinin and Lampert 2024 (arXiv 2405.13763).
    """
    return np.cumsum(momentum ** np.arange(steps, dtype=np.float64))


def divided(dividend: Series, divisor: Series) -> Series:
    """The first column of D⁻¹·N, for Toeplitz matrices N and D of ``len(dividend)`` rows.

    Args:
        dividend: of N, ``(T,)``.
        divisor: of D, at most T numbers, the first of which is not 0.

    Example:
        >>> divided(np.array([1.0, 0.0, 0.0]), np.array([1.0, -0.5]))
        array([1.  , 0.5 , 0.25])
    """
    from scipy.linalg import solve_banded  # slow to import, and needed by correlated noise alone

    bands = divisor[: len(dividend)]
    diagonals = np.repeat(bands[:, None], len(dividend), axis=1)
    quotient: Series = solve_banded((len(bands) - 1, 0), diagonals, dividend)
    return quotient


def inverse(series: Series, steps: int) -> Series:
    """The first column of the inverse of a Toeplitz matrix of ``steps`` rows."""
    one = np.zeros(steps)
    one[0] = 1.0
    return divided(one, series)


def squared_error(noise: Series) -> float:
    """‖E‖²_F / T of a Toeplitz matrix E: the mean over the T iterates of their noise's variance, if E = A·C⁻¹.

    Args:
        noise: the first column of E, ``(T,)``.
    """
    steps = len(noise)
    return float(np.arange(steps, 0, -1) @ noise**2) / steps


def moves_of_groups(series: Series, steps: int, groups: int) -> Series:
    """How far one example moves the first 1, 2, … T rows of C·G, if it takes part at most in every b-th step, ``(T,)``.

    It is in one of b groups, and takes part at most in the steps g, g + b, g + 2b, … of group g.

    Args:
        series: the first column of C.
        steps: T.
        groups: b ≥ 1.

    Returns:
        At place t - 1 the largest ‖Σᵢ C[:t, i] gᵢᵀ‖_F over groups, over subsets of the group's steps, and over gradients
        ‖gᵢ‖ ≤ 1: the sensitivity of a run of t steps.

    Guarantee:
        Exact. Its square is Σᵢⱼ ⟨C[:t, i], C[:t, j]⟩ ⟨gᵢ, gⱼ⟩, so where C has no negative entry all steps of the group with
        one and the same gradient are the worst, and the first group is: its columns are those of any other, moved up, so
        that less is cut off. Where columns of a group do not meet, since C has at most b bands, signs do not matter.

    Raises:
        ValueError: C has a negative entry and more than b bands.

    Source: Kalinin and Lampert 2024 (arXiv 2405.13763), Theorem 2, for all patterns with a minimum separation; for these
    patterns it takes no theorem.

    Example:
        >>> moves_of_groups(np.array([3.0, 4.0]), steps=4, groups=2)  # two participations that do not meet
        array([3.        , 5.        , 5.83095189, 7.07106781])
    """
    column = np.zeros(steps)
    column[: len(series)] = series[:steps]
    if np.count_nonzero(column[groups:]) and column.min() < -1e-13 * abs(column[0]):
        raise ValueError(
            f"a strategy matrix with the entry {column.min():.3g} and more than {groups} bands: expected no negative entry, "
            "where its columns meet. Use other bands or momentum."
        )
    rows = np.zeros(-(-steps // groups) * groups)
    rows[:steps] = np.abs(column)
    moved = rows.reshape(-1, groups).cumsum(axis=0).ravel()[:steps]
    moves: Series = np.sqrt(np.cumsum(moved**2))
    return moves


def gram_of_bins(series: Series, steps: int, bins: int) -> Series:
    """⟨C xᵢ, C xⱼ⟩ for the bins of a block, ``(k, k)``: xᵢ is 1 in the steps i, i + k, i + 2k, … and 0 elsewhere.

    Args:
        series: the first column of C.
        steps: T, a whole number of blocks.
        bins: k.

    Example:
        >>> gram_of_bins(np.array([3.0, 4.0]), steps=2, bins=2)
        array([[25., 12.],
               [12.,  9.]])
    """
    column = np.zeros(steps)
    column[: len(series)] = series[:steps]
    first = column.reshape(-1, bins).cumsum(axis=0).ravel()  # C x₀; the others are the same, later
    found = np.zeros((bins, bins))
    for lag in range(bins):
        products = np.cumsum(first[lag:] * first[: steps - lag])
        entries = products[steps - 1 - np.arange(lag, bins)]  # of the bins (j - lag, j): T - j terms
        found[np.arange(bins - lag), np.arange(lag, bins)] = found[np.arange(lag, bins), np.arange(bins - lag)] = (
            entries
        )
    return found


def sensitivity_of_groups(series: Series, steps: int, groups: int) -> float:
    """How far one example moves all T rows: the last of :func:`moves_of_groups`."""
    return float(moves_of_groups(series, steps, groups)[-1])


@lru_cache(maxsize=64)
def best_banded(steps: int, bands: int, momentum: float) -> tuple[float, ...]:
    """The first column of the banded Toeplitz C, of norm 1, with the least error ‖A·C⁻¹‖²_F·‖c‖² of the iterates.

    A small search by L-BFGS in ``bands - 1`` variables with the exact gradient, begun at the square root of the workload.

    Args:
        steps: T.
        bands: b, at most T.
        momentum: β of the workload.

    Source: Choquette-Choo et al. 2023 (arXiv 2306.08153), in the Toeplitz form of McKenna 2024 (arXiv 2405.15913).

    Example:
        >>> best_banded(100, 1, 0.9)
        (1.0,)
    """
    from scipy.optimize import minimize  # likewise

    steps = max(bands, min(steps, LONGEST_SEARCH))
    workload = momentum_workload(steps, momentum)
    weights = np.arange(steps, 0, -1) / steps

    def error(rest: Series) -> tuple[float, Series]:
        series = np.concatenate([[1.0], rest])
        with np.errstate(over="ignore", invalid="ignore"):
            noise = divided(workload, series)
            mean, square = float(weights @ noise**2), float(series @ series)
        if not mean < _TOO_LARGE:  # C⁻¹ grows from step to step: the line search comes back from here
            return math.log(_TOO_LARGE), rest
        change = divided(noise, series)
        slope = np.array([-2.0 * float((weights * noise)[j:] @ change[: steps - j]) for j in range(1, bands)])
        return math.log(mean * square), slope / mean + 2.0 * rest / square

    start = inverse_square_root(bands, momentum)
    found = minimize(error, inverse(start, bands)[1:], jac=True, method="L-BFGS-B") if bands > 1 else None
    series = np.concatenate([[1.0], [] if found is None else found.x])
    return _rounded(series / np.sqrt(series @ series))


def inverse_square_root(bands: int, momentum: float) -> Series:
    """The first p coefficients of A^(-1/2), for the workload A of SGD with momentum: (1 - x)^½ (1 - βx)^½.

    Example:
        >>> inverse_square_root(4, 0.0)
        array([ 1.    , -0.5   , -0.125 , -0.0625])

    Source: Kalinin, McKenna, Upadhyay, Lampert 2025 (arXiv 2505.12128).
    """
    k = np.arange(1, bands)
    root = np.concatenate([[1.0], np.cumprod((2 * k - 3) / (2 * k))])
    return np.convolve(root, root * momentum ** np.arange(bands))[:bands]


@lru_cache(maxsize=64)
def best_lambda(steps: int, groups: int, momentum: float) -> float:
    """λ of C⁻¹ = I - λ·(shift by one step) with the least error of the iterates, times the squared sensitivity.

    Args:
        steps: T.
        groups: b of :func:`sensitivity_of_groups`.
        momentum: β of the workload.

    Source: Kalinin, McKenna, Pagh, Lampert 2026 (arXiv 2601.22334).
    """
    from scipy.optimize import minimize_scalar  # likewise

    steps = min(steps, LONGEST_SEARCH)
    workload = momentum_workload(steps, momentum)

    def error(share: float) -> float:
        strategy = share ** np.arange(steps, dtype=np.float64)
        noise = workload - share * np.concatenate([[0.0], workload[:-1]])
        return squared_error(noise) * sensitivity_of_groups(strategy, steps, groups) ** 2

    found = minimize_scalar(error, bounds=(0.0, 1.0 - 1.0 / (steps + 1)), method="bounded", options={"xatol": 1e-6})
    return round(float(found.x), 6)


def _rounded(series: Series) -> tuple[float, ...]:
    return tuple(round(float(value), _DIGITS) for value in series)
