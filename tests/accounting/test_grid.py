"""The package's discretisation and its sums of exponentials are those of the libraries that would take a second to import."""

from __future__ import annotations

import math

import numpy as np
import pytest
from prv_accountant import PoissonSubsampledGaussianMechanism, PRVAccountant
from prv_accountant.discretisers import CellCentred
from prv_accountant.domain import Domain
from scipy.special import logsumexp

from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.accounting.grid import Grid, discretised
from lightning_dp.accounting.prv import PrivacyLossVariable
from lightning_dp.accounting.rdp import _log_of_sum


@pytest.mark.parametrize("adding", [False, True])
@pytest.mark.parametrize(
    ("sigma", "q", "reach", "size"), [(1.0, 0.01, 9.3, 5000), (3.7, 0.2, 5.0, 333_332), (0.6, 1.0, 40.1, 8192)]
)
def test_cells_are_those_of_prv_accountant(sigma: float, q: float, reach: float, size: int, adding: bool) -> None:
    grid, domain = Grid(-reach, 1.001 * reach, size), Domain(-reach, 1.001 * reach, size)
    assert (grid.end, grid.step) == (domain.t_max(), domain.dt())
    loss = PrivacyLossVariable(sigma, q, adding, grid.first, grid.end)
    loss.__dict__["pm_inf"] = 0.0  # theirs asks for it
    mass, shift = discretised(loss, grid)
    theirs = CellCentred().discretise(loss, domain)
    assert np.array_equal(mass, theirs.pmf)
    assert shift == float(theirs.domain.shifts())


def test_a_mean_that_is_half_a_cell_off_is_refused() -> None:
    class Elsewhere(PrivacyLossVariable):
        def mean(self) -> float:
            return 1.0

    with pytest.raises(RuntimeError, match="half a cell"):
        discretised(Elsewhere(1.0, 0.1, False, -5.0, 5.0), Grid(-5.0, 5.0, 1000))


@pytest.mark.parametrize(("sigma", "q", "steps"), [(1.0, 0.01, 1000), (2.0, 0.1, 200)])
def test_the_bound_is_that_of_prv_accountant_to_the_errors_of_both(sigma: float, q: float, steps: int) -> None:
    """Theirs is for one direction, and for its own error of 0.01."""
    other = PRVAccountant(PoissonSubsampledGaussianMechanism(q, sigma), 0.01, 1e-8, steps)
    low, _, high = other.compute_epsilon(1e-5, [steps])
    assert low <= epsilon_bound([Phase(sigma, q, steps)], 1e-5).epsilon <= high + 0.01


@pytest.mark.parametrize("values", [[0.0], [1.0, 1.0, 1.0], [-800.0, 3.0, 2.9], list(np.linspace(-40, 700, 999))])
def test_a_logarithm_of_a_sum_is_scipys(values: list[float]) -> None:
    assert _log_of_sum(np.array(values)) == float(logsumexp(values)) >= max(values)
    assert math.isfinite(_log_of_sum(np.array(values)))
