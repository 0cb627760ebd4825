"""From guesses about canaries to a lower bound on ε. Numbers only."""

from __future__ import annotations

import math

import numpy as np
from scipy import stats

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
    check_counts(canaries, guesses, correct)
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


def check_counts(canaries: int, guesses: int, correct: int) -> None:
    """Raise ``ValueError`` unless these can be the counts of one attack."""
    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(
            f"correct={correct}, guesses={guesses}, canaries={canaries}: expected 0 <= correct <= guesses <= canaries. "
            "Count each canary once."
        )


def check_confidence(confidence: float) -> None:
    """Raise ``ValueError`` unless ``confidence`` lies in (0, 1)."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}: expected a number in (0, 1), such as 0.95.")
