"""Accountants that know nothing of each other bracket the ε that is reported."""

from __future__ import annotations

import math
from itertools import product

import pytest
from scipy.stats import norm

from lightning_dp.accounting import Phase, epsilon_bound, side_by_side
from lightning_dp.accounting.compare import pld_epsilon

ROUNDING = 1e-6
OF_ANY_USE = 100.0
"""At ε in the thousands dp_accounting 0.6's optimistic bound exceeds the Gaussian mechanism's exact ε; see below."""
FEW = [(1.0, 0.05, 20), (3.0, 0.3, 50), (0.7, 0.01, 200)]
GRID = list(product((0.5, 0.7, 1.0, 2.0, 4.0, 10.0), (0.001, 0.01, 0.1, 0.5, 1.0), (1, 30, 1000)))
MIXED = [
    [Phase(1.0, 0.01, 200), Phase(2.0, 0.01, 300)],
    [Phase(3.0, 0.1, 40), Phase(3.0, 0.3, 40)],
    [Phase(1.5, 1.0, 2), Phase(1.5, 0.2, 30), Phase(4.0, 0.05, 500)],
]


def bracketed(phases: list[Phase], delta: float) -> None:
    """PRV's upper bound is never below PLD's optimistic bound, and never above RDP."""
    found = side_by_side(phases, delta)
    assert found["prv"] is not None
    assert found["rdp"] is not None
    assert found["pld_low"] is not None
    if found["prv"] < OF_ANY_USE:
        assert found["prv"] >= found["pld_low"] - ROUNDING, (phases, delta, found)
    assert found["prv"] <= found["rdp"] + ROUNDING, (phases, delta, found)


@pytest.mark.parametrize("mechanism", FEW)
def test_prv_lies_between_the_others(mechanism: tuple[float, float, int]) -> None:
    bracketed([Phase(*mechanism)], 1e-5)


@pytest.mark.parametrize("phases", MIXED)
def test_so_it_does_when_sigma_or_q_changed(phases: list[Phase]) -> None:
    bracketed(phases, 1e-5)


def test_where_pld_exceeds_the_exact_epsilon_the_exact_one_is_right() -> None:
    """δ(ε) = Φ(-ε/μ + μ/2) - e^ε·Φ(-ε/μ - μ/2) with μ² = T/σ² (Balle and Wang 2018), by logarithms."""
    found, mu = epsilon_bound([Phase(0.5, 1.0, 1000)], 1e-3).epsilon, math.sqrt(1000) / 0.5
    lost = math.exp(found + norm.logcdf(-found / mu - mu / 2))
    assert norm.cdf(-found / mu + mu / 2) - lost == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.nightly
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-8])
@pytest.mark.parametrize("mechanism", GRID)
def test_on_a_large_grid(mechanism: tuple[float, float, int], delta: float) -> None:
    bracketed([Phase(*mechanism)], delta)


def test_no_steps_and_no_noise() -> None:
    assert pld_epsilon([Phase(1.0, 0.1, 0)], 1e-5, pessimistic=True) == 0
    assert pld_epsilon([Phase(0.0, 0.1, 1)], 1e-5, pessimistic=True) == math.inf
