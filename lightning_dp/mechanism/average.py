"""Exponential moving average of parameters, with warm-up."""

from __future__ import annotations

from torch import Tensor


def warmed_up_decay(decay: float, updates: int) -> float:
    """min(μ, (1 + t) / (10 + t)) for update ``t = updates``, the first being 1 (De et al. 2022, their code).

    Early averages forget the initial parameters quickly; from t ≈ 10·μ/(1−μ) on the decay is μ itself.

    Example:
        >>> warmed_up_decay(0.999, 2), warmed_up_decay(0.5, 1000)
        (0.25, 0.5)
    """
    return min(decay, (1 + updates) / (10 + updates))


def average(previous: Tensor, current: Tensor, decay: float) -> Tensor:
    """``decay · previous + (1 − decay) · current``, a function of released values only (post-processing)."""
    return previous.lerp(current.to(previous.dtype), 1 - decay)
