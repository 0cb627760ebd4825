"""The filter between release and optimizer as plain public numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from lightning_dp.validate import number, shown

FilterStyle = Literal["disk"]
DEFAULT_GAIN, DEFAULT_LOOKAHEAD = 0.7, 0.5
SMALLEST_LOOKAHEAD = 1e-3
NAMES = ("gradient_filter", "filter_gain", "filter_lookahead")
"""What a filter is given by, as arguments and in the ledger."""


@dataclass(frozen=True, slots=True)
class GradientFilter:
    r"""DiSK: a simplified Kalman filter of the released gradients.

    What is clipped of an example ξ, at the weights x and those one step before, and what the optimizer gets of the release:

    .. math::
        g(\xi) = c\,\nabla f(x_t + \gamma(x_t - x_{t-1}); \xi) + (1 - c)\,\nabla f(x_t; \xi), \quad
        c = \frac{1-\kappa}{\kappa\gamma}, \qquad
        m_t = (1-\kappa)\, m_{t-1} + \kappa\, \tilde g_t

    The filter lags behind the gradient by what the difference of the two gradients tells, and takes most of the noise out.

    Args:
        gain: κ in (0, 1]; 1 filters nothing.
        lookahead: γ of at least 0.001. With γ = (1-κ)/κ, c is 1 and one gradient is enough.

    Raises:
        ValueError: a number is out of range.

    Guarantee:
        Both gradients of an example are added up before the one clip, and x is public. So the sensitivity is that of a step
        without the filter, and the filter itself is post-processing: ε is unchanged.

    Example:
        >>> GradientFilter(0.5, 1.0).weight
        1.0

    Source: Zhang, Bu, Balle, Hong, Razaviyayn, Mirrokni 2024 (arXiv 2410.03883), algorithm 1.
    """

    gain: float = DEFAULT_GAIN
    lookahead: float = DEFAULT_LOOKAHEAD

    def __post_init__(self) -> None:
        if not 0 < number("filter_gain", self.gain) <= 1:
            raise ValueError(f"filter_gain={self.gain}: expected a number in (0, 1], such as 0.7; 1 filters nothing.")
        if not SMALLEST_LOOKAHEAD <= number("filter_lookahead", self.lookahead) < float("inf"):
            raise ValueError(
                f"filter_lookahead={self.lookahead}: expected a finite number of at least {SMALLEST_LOOKAHEAD}, such as 0.5."
            )

    @property
    def weight(self) -> float:
        """The weight c of the gradient ahead."""
        c = (1 - self.gain) / (self.gain * self.lookahead)
        return 1.0 if abs(c - 1) < 1e-9 else c

    def __str__(self) -> str:
        return f"DiSK with κ = {self.gain:g} and γ = {self.lookahead:g}"


def filter_of(style: object, gain: float, lookahead: float) -> GradientFilter | None:
    """The filter of these arguments; ``None`` for none.

    Raises:
        ValueError: there is no such filter, or a number is out of range.
    """
    made = GradientFilter(gain, lookahead)
    if style is None:
        return None
    if not isinstance(style, str) or style not in get_args(FilterStyle):
        raise ValueError(f"gradient_filter={shown(style)}: expected 'disk', or None for the gradients as they are.")
    return made


def read_filter(style: object, gain: float | None, lookahead: float | None) -> GradientFilter | None:
    """The filter of :func:`filter_numbers`, as a ledger has them: without a filter all are ``None``.

    Raises:
        ValueError: there is no such filter, a number is out of range, or there are numbers of no filter.
    """
    if style is not None and gain is not None and lookahead is not None:
        return filter_of(style, gain, lookahead)
    if (style, gain, lookahead) != (None, None, None):
        raise ValueError(
            f"gradient_filter={shown(style)}, filter_gain={shown(gain)}, filter_lookahead={shown(lookahead)}: expected all of "
            "them, or None for each."
        )
    return None


def filter_numbers(rule: GradientFilter | None) -> dict[str, Any]:
    """By :data:`NAMES`, as plain values; all ``None`` without a filter.

    Example:
        >>> filter_numbers(GradientFilter(0.5, 1.0))
        {'gradient_filter': 'disk', 'filter_gain': 0.5, 'filter_lookahead': 1.0}
    """
    values = (None, None, None) if rule is None else ("disk", float(rule.gain), float(rule.lookahead))
    return dict(zip(NAMES, values, strict=True))
