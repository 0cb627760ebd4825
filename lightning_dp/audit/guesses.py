"""Guesses about canaries: which are made, how many, and how many are right. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr

from lightning_dp.accounting.tradeoff import Curve
from lightning_dp.audit.curve_bound import refutes

_POINTS = 400
"""Of a Gaussian's curve, which only decides how many guesses are made."""


@dataclass(frozen=True)
class Guesses:
    """Right and wrong guesses of one attack.

    Args:
        attack: its name.
        canaries: how many canaries had a coin.
        guesses: for how many of them a guess was made.
        correct: how many guesses are right.
    """

    attack: str
    canaries: int
    guesses: int
    correct: int


def guess(attack: str, scores: np.ndarray, members: np.ndarray, guesses: int) -> Guesses:
    """Guess that the highest scores were in and the lowest were out, and abstain in between.

    Args:
        attack: a name for the result.
        scores: one number for each canary, ``(m,)``; high means "was trained on".
        members: whether each canary was in, ``(m,)`` of bool; only used to count right guesses.
        guesses: how many guesses to make in all, half of them "in"; at most m.
    """
    side = min(guesses, len(scores)) // 2
    order = np.argsort(np.nan_to_num(scores, nan=0.0), kind="stable")
    lowest, highest = order[:side], order[len(order) - side :]
    correct = int(members[highest].sum()) + int((~members[lowest]).sum())
    return Guesses(attack, len(scores), 2 * side, correct)


@lru_cache(maxsize=64)
def planned_guesses(canaries: int, epsilon: float, delta: float, confidence: float = 0.95) -> int:
    """How many guesses give the best bound if the claim is exactly true. Public numbers decide, not the scores.

    The mechanism is taken for the Gaussian one with the same (ε, δ), whose scores are N(0, 1) without the canary and
    N(μ, 1) with it (Dong, Roth and Su 2022, for the limit of many steps), and the bound for that of its curve
    (:func:`~lightning_dp.audit.curve_bound.refutes`). A poor choice weakens the bounds and cannot make them wrong; a choice
    made after looking at how many are right would.

    Example:
        >>> planned_guesses(1000, 8.0, 1e-5) < planned_guesses(20_000, 8.0, 1e-5)
        True
    """
    if canaries < 4 or not math.isfinite(epsilon):
        return canaries // 2 * 2
    shift = gaussian_shift(max(epsilon, 1e-2), delta)
    best, chosen = -1.0, 2 * (canaries // 4)
    for side in dict.fromkeys(int(k) for k in np.geomspace(2, canaries // 2, 16)):
        share = side / canaries
        threshold = brentq(
            lambda t, share=share: 0.5 * (stats.norm.sf(t) + stats.norm.sf(t - shift)) - share, -40.0, 40.0 + shift
        )
        correct = int(2 * side * 0.5 * float(stats.norm.sf(threshold - shift)) / share)
        bound = _refuted_shift(canaries, 2 * side, min(correct, 2 * side), 1.0 - confidence, shift)
        if bound > best:
            best, chosen = bound, 2 * side
    return chosen


def _refuted_shift(canaries: int, guesses: int, correct: int, level: float, most: float) -> float:
    """The largest μ below ``most`` whose curve is refuted, roughly."""
    low, high = 0.0, most
    while high - low > 1e-2 * most:
        middle = (low + high) / 2.0
        if refutes(level, canaries, guesses, correct, Curve.gaussian(middle, _POINTS)):
            low = middle
        else:
            high = middle
    return low


def gaussian_shift(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism with that (ε, δ) (Balle and Wang 2018, Theorem 8)."""

    def excess(mu: float) -> float:
        lost = math.exp(min(epsilon + float(log_ndtr(-epsilon / mu - mu / 2)), 700.0))
        return float(ndtr(-epsilon / mu + mu / 2)) - lost - delta

    return float(brentq(excess, 1e-4, 2.0 * math.sqrt(2.0 * epsilon) + epsilon + 10.0))
