"""What choosing among several private runs costs: a fixed number of runs, or a random one of which the best is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from lightning_dp.accounting.epsilon import EpsilonBound, epsilon_bound
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.rdp import ORDERS, FloatArray, epsilon_of_log_moments, total_log_moments
from lightning_dp.plan.privacy_plan import check_delta

RandomNumber = Literal["geometric", "logarithmic", "poisson"]
"""How the number of runs is drawn. Geometric is the truncated negative binomial with η = 1, logarithmic that with η = 0."""

_ETA = {"geometric": 1.0, "logarithmic": 0.0}


def search_epsilon(
    phases: Sequence[Phase], delta: float, runs: float, random: RandomNumber | None = None
) -> EpsilonBound:
    """Upper bound on ε of a search over settings, each tried by a run with the same σ, q and number of steps.

    | ``random`` | what may be released | bound |
    |---|---|---|
    | ``None`` | everything about exactly ``runs`` runs | their composition (PRV) |
    | ``"geometric"``, ``"logarithmic"`` | the best run alone | Papernot and Steinke 2022, Theorem 2 |
    | ``"poisson"`` | the best run alone, or nothing if no run is drawn | the same, Theorem 6 |

    With a random number, three conditions are the user's to keep: the number of runs is drawn before the first one and is
    never told; each run's settings are drawn independently from a distribution fixed beforehand; and the score by which the
    best run is chosen is covered by ``phases`` or needs no private data.

    Args:
        phases: one run.
        delta: δ of the whole search.
        runs: their number, or with ``random`` their mean.
        random: the distribution of their number.

    Raises:
        ValueError: ``delta`` is outside (0, 1), ``runs`` is below 1 or, without ``random``, no whole number.

    Example:
        >>> one = [Phase(3.0, 4096 / 50000, 875)]
        >>> [round(search_epsilon(one, 1e-5, 20, how).epsilon) for how in (None, "geometric", "logarithmic")]
        [22, 8, 7]

    Source: K. Liu and K. Talwar, *Private Selection from Private Candidates*, 2019 (arXiv 1811.07971); N. Papernot and T.
    Steinke, *Hyperparameter Tuning with Rényi Differential Privacy*, ICLR 2022 (arXiv 2110.03620), Theorems 2 and 6.
    """
    check_delta(delta)
    if not (runs >= 1 and math.isfinite(runs)):
        raise ValueError(f"runs={runs}: expected at least 1.")
    if random is None:
        if runs != int(runs):
            raise ValueError(
                f"runs={runs}: expected a whole number. Give random='geometric' to have it drawn at random."
            )
        return epsilon_bound([replace(phase, steps=phase.steps * int(runs)) for phase in phases], delta)
    if random not in get_args(RandomNumber):
        raise ValueError(f"random={random!r}: expected one of {', '.join(get_args(RandomNumber))}, or None.")
    if not any(phase.steps for phase in phases):
        return EpsilonBound(0.0, "exact")
    one = total_log_moments(phases) / (ORDERS - 1.0)
    many = best_of_poisson(one, runs) if random == "poisson" else best_of_negative_binomial(one, runs, _ETA[random])
    return EpsilonBound(epsilon_of_log_moments(many * (ORDERS - 1.0), delta), "RDP")


def best_of_negative_binomial(one: FloatArray, mean: float, eta: float) -> FloatArray:
    """Rényi divergences of the best of a truncated negative binomial number of runs.

    ε'(α) = ε(α) + (1 + η)·min over β of [(1 − 1/β)·ε(β) + log(1/γ)/β] + log(mean)/(α − 1), with γ the distribution's
    parameter (Papernot and Steinke 2022, Theorem 2).

    Args:
        one: of one run, one for each of :data:`~lightning_dp.accounting.rdp.ORDERS`.
        mean: mean number of runs, at least 1.
        eta: η, above −1; 1 is the geometric distribution, 0 the logarithmic one.
    """
    price = (1.0 - 1.0 / ORDERS) * one - math.log(stopping_probability(mean, eta)) / ORDERS
    return one + (1.0 + eta) * float(np.min(price)) + math.log(mean) / (ORDERS - 1.0)


def best_of_poisson(one: FloatArray, mean: float) -> FloatArray:
    """Rényi divergences of the best of a Poisson number of runs (Papernot and Steinke 2022, Theorem 6).

    ε'(α) = ε(α) + mean·δ + log(mean)/(α − 1), where one run is (log(1 + 1/(α − 1)), δ)-DP.

    Args:
        one: of one run, one for each of :data:`~lightning_dp.accounting.rdp.ORDERS`.
        mean: mean number of runs, at least 1.
    """
    shift = np.log1p(-1.0 / ORDERS) * (ORDERS - 1.0) - np.log(
        ORDERS
    )  # Canonne, Kamath and Steinke 2020, Proposition 12
    pure = np.log1p(1.0 / (ORDERS - 1.0))
    log_delta = np.array([np.min((ORDERS - 1.0) * (one - epsilon) + shift) for epsilon in pure])
    many: FloatArray = one + mean * np.exp(np.minimum(log_delta, 0.0)) + math.log(mean) / (ORDERS - 1.0)
    return many


def stopping_probability(mean: float, eta: float) -> float:
    """γ of the truncated negative binomial distribution on 1, 2, ... with this mean, not rounded up.

    The mean is η(1 − γ) / (γ(1 − γ^η)), and (1/γ − 1) / log(1/γ) for η = 0 (Papernot and Steinke 2022, Definition 1).

    Example:
        >>> stopping_probability(20, 1.0)
        0.05
    """
    if eta == 1.0 or mean == 1.0:
        return 1.0 / mean

    def surplus(log_gamma: float) -> float:
        odds = math.expm1(-log_gamma)  # 1/γ − 1
        expected = odds / -log_gamma if eta == 0 else eta * odds / -math.expm1(eta * log_gamma)
        return math.log(expected) - math.log(mean)

    from scipy.optimize import brentq  # slow to import, and seldom needed

    low = -1.0
    while surplus(low) < 0:
        low *= 2.0
    return math.exp(float(brentq(surplus, low, -1e-12)) - 1e-9)
