"""The same ε by several accountants, to be looked at side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec

from lightning_dp.accounting.epsilon import epsilon_bound
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.prv import prv_accountant_interval
from lightning_dp.accounting.rdp import rdp_epsilon

PLD_INTERVAL = 1e-4
"""The grid of privacy losses. Optimistic rounding loses up to this much at each step."""


def side_by_side(phases: Sequence[Phase], delta: float) -> dict[str, float | None]:
    """ε of all ``phases`` composed, by each accountant there is.

    Args:
        phases: runs of identical steps.
        delta: δ, in (0, 1).

    Returns:
        ``"prv"``: the upper bound that this package reports (:func:`epsilon_bound`); ``"prv_accountant"``: that of the package
        ``prv-accountant``, or ``None`` where it has none; ``"rdp"``: the Rényi upper bound; ``"pld_low"`` and ``"pld_high"``:
        optimistic and pessimistic privacy loss distributions of Google's ``dp-accounting``, or ``None`` where it is not
        installed.

    Raises:
        ValueError: ``delta`` is outside (0, 1).

    Example:
        >>> found = side_by_side([Phase(3.0, 0.08192, 100)], 1e-5)
        >>> found["prv"] < found["rdp"]
        True

    Source: Koskela, Jälkö and Honkela (2020); Doroshenko et al. (2022) for the privacy loss distributions.
    """
    theirs = prv_accountant_interval(phases, delta)
    return {
        "prv": epsilon_bound(phases, delta).epsilon,
        "prv_accountant": None if theirs is None else theirs[1],
        "rdp": rdp_epsilon(phases, delta),
        "pld_low": pld_epsilon(phases, delta, pessimistic=False),
        "pld_high": pld_epsilon(phases, delta, pessimistic=True),
    }


def pld_epsilon(
    phases: Sequence[Phase], delta: float, *, pessimistic: bool, interval: float = PLD_INTERVAL
) -> float | None:
    """ε by privacy loss distributions, both directions; ``None`` where ``dp-accounting`` is not installed or has no such event.

    Args:
        phases: runs of identical steps.
        delta: δ, in (0, 1).
        pessimistic: an upper bound (True) or a lower one, up to rounding.
        interval: the grid of privacy losses.
    """
    if find_spec("dp_accounting") is None or any(phase.law != "poisson" for phase in phases):
        return None
    taken = [phase for phase in phases if phase.steps]
    if not taken:
        return 0.0
    if any(phase.noise_multiplier == 0 for phase in taken):
        return math.inf
    distribution = import_module("dp_accounting.pld.privacy_loss_distribution")
    composed = None
    for phase in taken:
        one = distribution.from_gaussian_mechanism(
            phase.noise_multiplier,
            sampling_prob=phase.sampling_probability,
            value_discretization_interval=interval,
            pessimistic_estimate=pessimistic,
            use_connect_dots=pessimistic,
        )
        many = one.self_compose(phase.steps)
        composed = many if composed is None else composed.compose(many)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))
