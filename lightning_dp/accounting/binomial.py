"""How likely a draw is large."""

from __future__ import annotations

from scipy.special import betainc

_ROUNDING = 1.0 + 1e-9
"""Every probability is rounded up by this factor: the incomplete beta function is good to about 1e-12."""


def at_least(trials: int, probability: float, number: int) -> float:
    """P[Binomial(n, q) ≥ m], rounded up.

    Args:
        trials: n.
        probability: q, in (0, 1].
        number: m.

    Example:
        >>> at_least(2, 0.5, 2) - 0.25 < 1e-9, at_least(5, 1.0, 5), at_least(5, 0.5, 6)
        (True, 1.0, 0.0)
    """
    if number > trials:
        return 0.0
    if number <= 0 or probability == 1.0:
        return 1.0
    return min(1.0, float(betainc(number, trials - number + 1, probability)) * _ROUNDING)
