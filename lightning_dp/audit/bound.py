"""From guesses about canaries to a lower bound on ε. Numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from lightning_dp.plan.privacy_plan import check_delta

_HIGHEST = 60.0
"""No bound above this is looked for: e⁶⁰ right guesses for a wrong one cannot be observed."""


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """How likely an (ε, δ)-private mechanism lets anybody guess so well: an upper bound on P[at least ``correct``].

    Each of m canaries was put into the training set by a fair coin of its own, one training run was made, and
    membership was guessed for r of them. With W ~ Binomial(r, 1 / (1 + e^-ε)) and
    α = max over i ≥ 1 of P[v > W ≥ v - i] / i,

        P[at least v guesses are right] ≤ P[W ≥ v] + 2·m·δ·α .

    Args:
        canaries: m, how many canaries had a coin (guessed or not).
        guesses: r, for how many of them a guess was made.
        correct: v, how many guesses are right.
        epsilon: ε of the claim that is tested.
        delta: δ of that claim, in [0, 1).

    Raises:
        ValueError: not 0 ≤ correct ≤ guesses ≤ canaries.

    Example:
        >>> p_value(100, 100, 99, epsilon=1.0, delta=0.0) < 1e-9, p_value(100, 100, 60, epsilon=1.0, delta=0.0) > 0.9
        (True, True)

    Source: Steinke, Nasr and Jagielski (2023), "Privacy auditing with one (1) training run", arXiv 2305.08846,
    Theorem 5.2.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"correct={correct}, guesses={guesses}, canaries={canaries}: expected 0 <= correct <= guesses <= canaries. "
            "Count each canary once."
        )
    accuracy = 1.0 / (1.0 + math.exp(-epsilon))
    tail = float(stats.binom.sf(correct - 1, guesses, accuracy))
    if correct == 0 or delta == 0:
        return min(1.0, tail)
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, accuracy))
    alpha = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2.0 * canaries * delta * alpha)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that the guesses refute: with ``confidence``, the mechanism is not (ε, δ)-private.

    Args:
        canaries: m, how many canaries had a coin.
        guesses: r, how many guesses were made; chosen without looking at the answers.
        correct: v, how many are right.
        delta: δ, in (0, 1).
        confidence: in (0, 1): a bound above the true ε comes out in at most a share 1 - ``confidence`` of audits.

    Returns:
        ε, at least 0; 0 where nothing is refuted.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> 3.4 < epsilon_lower_bound(1000, 100, 100, delta=1e-6) < 3.5
        True
        >>> epsilon_lower_bound(1000, 100, 55, delta=1e-6)
        0.0

    Source: Steinke, Nasr and Jagielski (2023), Theorem 5.2, read as a test for each ε (their section 5).
    """
    check_delta(delta)
    check_confidence(confidence)
    level = 1.0 - confidence

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, correct, epsilon, delta) - level

    grid = np.arange(0.0, _HIGHEST + 1.0)
    held = next((epsilon for epsilon in grid if excess(epsilon) >= 0), None)
    if held is None:
        return _HIGHEST
    if held == 0:
        return 0.0
    refuted, held = float(held - 1.0), float(held)
    while held - refuted > 1e-6:  # the p-value need not be monotone in ε: keep to the first ε that is not refuted
        middle = (refuted + held) / 2.0
        if excess(middle) < 0:
            refuted = middle
        else:
            held = middle
    return refuted


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
    N(μ, 1) with it (Dong, Roth and Su 2022, for the limit of many steps). A poor choice weakens the bound and cannot
    make it wrong.

    Example:
        >>> planned_guesses(1000, 8.0, 1e-5) < planned_guesses(20_000, 8.0, 1e-5)
        True
    """
    if canaries < 4 or not math.isfinite(epsilon):
        return canaries // 2 * 2
    shift = _gaussian_shift(max(epsilon, 1e-2), delta)
    best, chosen = -1.0, 2 * (canaries // 4)
    for side in dict.fromkeys(int(k) for k in np.geomspace(2, canaries // 2, 16)):
        share = side / canaries
        threshold = brentq(
            lambda t, share=share: 0.5 * (stats.norm.sf(t) + stats.norm.sf(t - shift)) - share, -40.0, 40.0 + shift
        )
        correct = int(2 * side * 0.5 * float(stats.norm.sf(threshold - shift)) / share)
        bound = epsilon_lower_bound(canaries, 2 * side, min(correct, 2 * side), delta, confidence)
        if bound > best:
            best, chosen = bound, 2 * side
    return chosen


def _gaussian_shift(epsilon: float, delta: float) -> float:
    """μ of the Gaussian mechanism with that (ε, δ) (Balle and Wang 2018, Theorem 8)."""

    def excess(mu: float) -> float:
        lost = math.exp(min(epsilon + float(stats.norm.logcdf(-epsilon / mu - mu / 2)), 700.0))
        return float(stats.norm.cdf(-epsilon / mu + mu / 2)) - lost - delta

    return float(brentq(excess, 1e-4, 2.0 * math.sqrt(2.0 * epsilon) + epsilon + 10.0))


def check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` unless ``confidence`` lies in (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number in (0, 1), such as 0.95.")
