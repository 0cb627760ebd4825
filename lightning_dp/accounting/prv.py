"""The package of those who found the PRV accountant, ``prv-accountant``: a second opinion on ε."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np

from lightning_dp.accounting.phase import Phase

EPSILON_ERROR = 0.01
"""The discretisation error in ε for which the grid is made."""

MOST_STEPS = 20_000
"""Beyond, its grid takes minutes and gigabytes."""

_DELTA_SHARE = 1e-3


class PrvFailureError(RuntimeError):
    """No grid can give a trustworthy number here; the message says why, in words."""


def prv_accountant_interval(phases: Sequence[Phase], delta: float) -> tuple[float, float] | None:
    """Between which numbers ε lies by ``prv-accountant``: its estimate, and 0.01 to either side of it.

    It knows nothing of this package's own composition, which reports a smaller upper bound. It is of one direction, of the
    example being removed, which is the larger one but for a few plans of few steps.

    Args:
        phases: runs of identical steps.
        delta: δ, in (0, 1).

    Returns:
        A lower bound and an upper one; ``None`` for what it has no law of (another law than Poisson sampling, cut draws, no
        noise), for more than 20,000 steps, or where it gives up.

    Example:
        >>> low, high = prv_accountant_interval([Phase(3.0, 0.08192, 100)], 1e-5)
        >>> 1.13 < low < 1.14 < high < 1.16
        True

    Source: Gopi, Lee and Wutschitz (2021), "Numerical composition of differential privacy", Theorem 5.5.
    """
    taken = [phase for phase in phases if phase.steps]
    if not taken:
        return 0.0, 0.0
    known = all(phase.law == "poisson" and phase.seldom is None and phase.noise_multiplier > 0 for phase in taken)
    counts = [phase.steps for phase in taken]
    if not known or sum(counts) > MOST_STEPS:
        return None
    package = import_module("prv_accountant")
    with np.errstate(all="ignore"):
        try:
            accountant = package.PRVAccountant(
                prvs=[_variable(package, phase) for phase in taken],
                max_self_compositions=counts,
                eps_error=EPSILON_ERROR,
                delta_error=_DELTA_SHARE * delta,
            )
            low, _, high = accountant.compute_epsilon(delta, counts)
        except (ArithmeticError, MemoryError, RuntimeError, ValueError):
            return None
    return max(0.0, float(low)), float(high)


def _variable(package: Any, phase: Phase) -> Any:
    if phase.sampling_probability == 1.0:
        return package.GaussianMechanism(noise_multiplier=phase.noise_multiplier)
    return package.PoissonSubsampledGaussianMechanism(
        noise_multiplier=phase.noise_multiplier, sampling_probability=phase.sampling_probability
    )
