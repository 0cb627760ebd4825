"""The package of those who found the PRV accountant, beside the bound that is reported."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import logsumexp

from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.accounting.phase import Seldom
from lightning_dp.accounting.prv import MOST_STEPS, prv_accountant_interval
from lightning_dp.accounting.rdp import _log_of_sum


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(1.0, 0.01, 1000)],
        [Phase(2.0, 0.1, 200)],
        [Phase(3.0, 0.08192, 500), Phase(4.0, 0.08192, 400)],
        [Phase(1.5, 1.0, 2), Phase(1.5, 0.2, 30)],
        [Phase(100.0, 0.00825, 388)],
    ],
)
def test_the_reported_bound_is_near_its_estimate(phases: list[Phase]) -> None:
    """Within its error of 0.01, and above the estimate but for what its grid is off by."""
    found = prv_accountant_interval(phases, 1e-5)
    assert found is not None
    low, high = found
    assert low <= high - 0.01
    assert high - 0.011 <= epsilon_bound(phases, 1e-5).epsilon <= high - 0.008


@pytest.mark.parametrize(
    "phases",
    [
        [Phase(1.0, 0.1, 5, "allocation")],
        [Phase(0.0, 0.1, 5)],
        [Phase(1.0, 0.01, MOST_STEPS + 1)],
        [Phase(1.0, 0.1, 5, seldom=Seldom(1e-3, 0.5, 0.1))],
    ],
)
def test_of_what_it_has_no_law_it_says_nothing(phases: list[Phase]) -> None:
    assert prv_accountant_interval(phases, 1e-5) is None


def test_where_it_gives_up_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import prv_accountant

    def off(*_: object, **__: object) -> None:
        raise RuntimeError("Discrete mean differs from continuous mean significantly.")

    monkeypatch.setattr(prv_accountant, "PRVAccountant", off)
    assert prv_accountant_interval([Phase(1.0, 0.1, 5)], 1e-5) is None
    assert prv_accountant_interval([], 1e-5) == (0.0, 0.0)


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0, 1.0], [-800.0, 3.0, 2.9], list(np.linspace(-40, 700, 999))])
def test_a_logarithm_of_a_sum_is_scipys(values: list[float]) -> None:
    assert _log_of_sum(np.array(values)) == pytest.approx(float(logsumexp(values)), rel=1e-14)
    assert math.isfinite(_log_of_sum(np.array(values)))
