"""The correlation that pays most where sampling amplifies: less of it than without, since bins that differ hide each other."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from lightning_dp.accounting.mixture import can_simulate, closed_bound
from lightning_dp.accounting.phase import Phase
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.toeplitz import LONGEST_SEARCH, momentum_workload, squared_error

MOST_BINS = 256
"""Of more bins the search would take long, and λ is that without amplification."""

USUAL_EPSILON = 3.0
"""For which λ is found where no ε is asked for. It has to do with utility alone."""

_SHARES = tuple(round(1.0 - float(gap), 6) for gap in np.geomspace(0.9, 0.002, 14))


@lru_cache(maxsize=16)
def amplified_lambda(steps: int, bins: int, momentum: float, epsilon: float, delta: float) -> float:
    """λ of C⁻¹ = I - λ·(shift by one step) with the least noise in the iterates at this ε, for balls in bins; from a grid.

    σ is that of the bound in closed form (:func:`lightning_dp.accounting.mixture.closed_bound`), which is larger than the
    simulated one by about the same part for every λ.

    Args:
        steps: T.
        bins: k, at most 256.
        momentum: β of the workload.
        epsilon: ε.
        delta: δ.

    Example:
        >>> amplified_lambda(40, 10, 0.9, 1.0, 1e-5) < 0.9
        True
    """
    return min(_SHARES, key=lambda share: _noise(share, steps, bins, momentum, epsilon, delta))


def _noise(share: float, steps: int, bins: int, momentum: float, epsilon: float, delta: float) -> float:
    workload = momentum_workload(min(steps, LONGEST_SEARCH), momentum)
    error = squared_error(workload - share * np.concatenate([[0.0], workload[:-1]]))
    correlation = Correlation("lambda", steps, momentum, (1.0, -share))

    def holds(sigma: float) -> bool:
        phases = [Phase(sigma, 1.0 / bins, 1, "bins", correlation, -(-steps // bins))]
        return can_simulate(phases) and closed_bound(phases, delta) <= epsilon

    fails, good = 1e-2, 1e4
    while good / fails > 1.01:
        middle = math.sqrt(fails * good)
        fails, good = (fails, middle) if holds(middle) else (middle, good)
    return math.sqrt(error) * correlation.column_norm * good
