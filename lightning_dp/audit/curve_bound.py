"""From guesses about canaries to what they refute of a whole trade-off curve. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable

from lightning_dp.accounting.tradeoff import Curve
from lightning_dp.audit.bound import check_counts


def curve_p_value(canaries: int, guesses: int, correct: int, curve: Curve) -> float:
    """How likely a mechanism with this trade-off curve lets anybody guess so well: an upper bound on P[at least ``correct``].

    Each of m canaries was put into the training set by a fair coin of its own, one training run was made, and membership
    was guessed for r of them. Nothing is supposed of the mechanism but the curve: canaries may help or hide each other.

    With p_j = P[exactly j guesses are right], R_v = Σ_{j ≥ v} j·p_j / m and H_v = Σ_{j ≥ v} (r - j)·p_j / m,

        H_{v-1} ≥ least(R_v)   for every v ≥ 1 ,      R_0 + H_0 = r / m ,

    since "guess i is g, and v - 1 or more of the others are right" is an event of the run, has R_v on average over i, g and the
    other coins where coin i is g, and H_{v-1} where it is not; ``least`` is convex, so Jensen's inequality holds for the
    averages. Among all p with P[at least c] = α, the sum R_0 + H_0 is least where all of α lies at c and each p_j, from
    c - 1 down, is as small as these inequalities let it: so α is too large if that sum is above r / m.

    Args:
        canaries: m, how many canaries had a coin (guessed or not).
        guesses: r, for how many of them a guess was made.
        correct: c, how many guesses are right.
        curve: what is claimed.

    Raises:
        ValueError: not 0 ≤ correct ≤ guesses ≤ canaries.

    Example:
        >>> fair = Curve.of(0.0, 0.0)  # right or wrong by a coin, whatever the canaries do together
        >>> curve_p_value(100, 100, 99, fair) < 1e-9, curve_p_value(100, 100, 50, fair) > 0.5
        (True, True)

    Source: Mahloujifar, Melis and Chaudhuri (2025), "Auditing f-differential privacy in one run", arXiv 2410.22235,
    Algorithm 3, for two choices. The argument above is ours.
    """
    check_counts(canaries, guesses, correct)
    if guesses == 0 or correct == 0:
        return 1.0
    low, high = -200.0, 0.0  # of log α
    if not _too_likely(1.0, canaries, guesses, correct, curve.least):
        return 1.0
    while high - low > 1e-3:
        middle = (low + high) / 2.0
        if _too_likely(math.exp(middle), canaries, guesses, correct, curve.least):
            high = middle
        else:
            low = middle
    return math.exp(high)


def refutes(level: float, canaries: int, guesses: int, correct: int, curve: Curve) -> bool:
    """Whether so many right guesses are less likely than ``level`` under the curve: a valid test of that level.

    Example:
        >>> refutes(0.05, 1000, 100, 90, Curve.of(1.0, 1e-6))
        True
    """
    check_counts(canaries, guesses, correct)
    return correct > 0 and _too_likely(level, canaries, guesses, correct, curve.least)


def _too_likely(alpha: float, canaries: int, guesses: int, correct: int, least: Callable[[float], float]) -> bool:
    right, wrong = alpha * correct / canaries, alpha * (guesses - correct) / canaries
    for at in range(correct - 1, -1, -1):
        more = least(right) - wrong
        if more <= 0:  # and then it stays so
            return False
        wrong += more
        right += more * at / (guesses - at)
        if right + wrong > guesses / canaries:
            return True
    return False
