"""How a clip norm follows the gradients: a few coordinates beside each example's gradient, and the next C from their noisy sum.

They lie in the one vector whose norm is bounded, so that the noise, the ranks and the ledger treat them like any coordinate of
the gradient: a step stays one Gaussian mechanism with the noise multiplier σ, and the next C is post-processing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from lightning_dp.validate import number, shown, whole

MOST_BINS = 10_000
SMALLEST_CLIP_NORM = 1e-12
"""Of C, and the inverse of the largest: sums and noise are float32."""


@dataclass(frozen=True, slots=True)
class Quantile:
    """C follows a quantile of the gradients' norms.

    Each example adds λ(b − ½) beside its clipped gradient, where b is 1 if its norm is at most C and 0 otherwise, and λ = κC.
    The vector's norm is at most S = C·(1 + κ²/4)^½, and every coordinate of the sum gets noise of standard deviation σS. From
    the noisy sum z and the expected batch size B the share of norms up to C is estimated as ½ + z/(λB), and

        log C ← log C − η·(½ + z/(λB) − target).

    The number of examples drawn is private and enters nowhere. Its expectation is B, so the estimate has no bias.

    Args:
        target: the share of norms that C is to be above, in (0, 1).
        learning_rate: η > 0.
        weight: κ > 0. The gradient's noise is (1 + κ²/4)^½ as large as with a fixed C, and the estimated count is off by
            σ·(1/κ² + ¼)^½ examples.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> rule = Quantile(weight=0.2)
        >>> round(rule.stretch, 4), rule.next_clip_norm([0.1], 1.0) < 1.0 < rule.next_clip_norm([-0.1], 1.0)
        (1.005, True)

    Source: Andrew, Thakkar, McMahan, Ramaswamy 2021 (arXiv 1905.03871), Algorithm 1 and Theorem 1, whose z_Δ is σ·S/C here and
    whose σ_b is σS/λ.
    """

    target: float = 0.5
    learning_rate: float = 0.2
    weight: float = 0.2

    names: ClassVar[dict[str, str]] = {
        "target": "clip_quantile",
        "learning_rate": "clip_learning_rate",
        "weight": "quantile_weight",
    }

    def __post_init__(self) -> None:
        if not 0 < number("clip_quantile", self.target) < 1:
            raise ValueError(
                f"clip_quantile={self.target}: expected a number between 0 and 1, such as 0.5 for the median."
            )
        _positive("clip_learning_rate", self.learning_rate, most=10.0, such_as=0.2)
        _positive("quantile_weight", self.weight, most=100.0, such_as=0.2)

    @property
    def coordinates(self) -> int:
        """How many there are beside a gradient."""
        return 1

    @property
    def stretch(self) -> float:
        """S/C: how much longer than C a gradient with its coordinate can be."""
        return math.sqrt(1.0 + self.weight**2 / 4.0)

    def next_clip_norm(self, released: Sequence[float], clip_norm: float) -> float:
        """C of the next step, from the noisy sum of the coordinates over B and C of this one."""
        below = 0.5 + released[0] / (self.weight * clip_norm)
        return _moved(clip_norm, self.learning_rate * (self.target - below))


@dataclass(frozen=True, slots=True)
class Slack:
    """C follows what clipping leaves unused of the norm bound, at no cost in noise.

    Each example of norm u adds K coordinates beside its clipped gradient, which fill up one after the other: the k-th is
    λ·min(1, max(0, K·(1 − u/C) − k + 1)) with λ = C/√K. The square of their length is at most C·(C − u) where u ≤ C, and so
    that of the whole vector at most u² + C² − Cu ≤ C²: S = C. With the noisy sums over λB, the estimates a_1, ..., a_K of the
    shares of norms below C, ..., C/K,

        r = min(1, max(0, a_K / C)),    log C ← log C + η·((1 + r)/2 − a_1).

    Args:
        bins: K. The estimates are off by σ√K/B each; about (B/5σ)^⅔ is a good number (equation 36 of the source).
        learning_rate: η > 0.

    Raises:
        ValueError: a number is out of its range.

    Example:
        >>> rule = Slack(bins=4)
        >>> rule.stretch, round(rule.next_clip_norm([0.5, 0.0, 0.0, 0.0], 1.0), 3)
        (1.0, 0.779)

    Source: Zou, Wang, Zhu, Li, Dong, Sassone, Wu, "SlaClip", ICML 2026, equations 6 to 11 and 28 to 30, as the authors' code
    has them.
    """

    bins: int = 10
    learning_rate: float = 0.5

    names: ClassVar[dict[str, str]] = {"bins": "slack_bins", "learning_rate": "clip_learning_rate"}

    def __post_init__(self) -> None:
        whole("slack_bins", self.bins, 1, MOST_BINS)
        _positive("clip_learning_rate", self.learning_rate, most=10.0, such_as=0.5)

    @property
    def coordinates(self) -> int:
        """How many there are beside a gradient."""
        return self.bins

    @property
    def stretch(self) -> float:
        """S/C: they fit into what is left of C."""
        return 1.0

    def next_clip_norm(self, released: Sequence[float], clip_norm: float) -> float:
        """C of the next step, from the noisy sums of the coordinates over B and C of this one."""
        full = clip_norm / math.sqrt(self.bins)
        near_zero = min(1.0, max(0.0, released[-1] / full / clip_norm))
        return _moved(clip_norm, self.learning_rate * ((1.0 + near_zero) / 2.0 - released[0] / full))


Adaptation = Quantile | Slack

KINDS: dict[str, type[Quantile] | type[Slack]] = {"quantile": Quantile, "slaclip": Slack}
"""Clipping style → what adapts its C."""
NAMES = ("clip_quantile", "clip_learning_rate", "quantile_weight", "slack_bins")
"""The numbers of all kinds, as arguments, in checkpoints and in logs."""


def adaptation_of(style: str, **given: float | int | None) -> Adaptation | None:
    """What adapts C in a clipping style; ``None`` if nothing does.

    Args:
        style: of clipping.
        given: by :data:`NAMES`; ``None`` for the default of the style.

    Raises:
        ValueError: a number is out of its range, or means nothing in this style.

    Example:
        >>> adaptation_of("quantile", clip_quantile=0.9)
        Quantile(target=0.9, learning_rate=0.2, weight=0.2)
    """
    kind = KINDS.get(style) if isinstance(style, str) else None
    own = {} if kind is None else kind.names
    for name, value in given.items():
        if value is not None and name not in own.values():
            styles = [repr(one) for one, other in KINDS.items() if name in other.names.values()]
            raise ValueError(
                f"{name}={shown(value)} with clipping={shown(style)}: expected it with clipping={' or '.join(styles)} alone, "
                "where it has a meaning. Leave it out, or choose that style."
            )
    chosen = {field: given[name] for field, name in own.items() if given.get(name) is not None}
    return None if kind is None else kind(**chosen)  # type: ignore[arg-type]  # numbers, which it checks


def numbers_of(adaptation: Adaptation | None) -> dict[str, Any]:
    """The inverse of :func:`adaptation_of`, by :data:`NAMES`, as plain values; ``None`` where there is no such number."""
    found: dict[str, Any] = dict.fromkeys(NAMES)
    if adaptation is not None:
        for one in fields(adaptation):
            value = getattr(adaptation, one.name)
            found[adaptation.names[one.name]] = int(value) if one.name == "bins" else float(value)
    return found


def check_adaptation(adaptation: object, style: str) -> None:
    """Raise ``ValueError`` unless it is what belongs to a style."""
    kind = KINDS.get(style)
    if kind is None and adaptation is not None:
        raise ValueError(
            f"adaptation={adaptation} with clipping={style!r}: expected None, since nothing adapts C there."
        )
    if kind is not None and not isinstance(adaptation, kind):
        known = ", ".join(one.__name__ for one in get_args(Adaptation))
        raise ValueError(f"adaptation={adaptation} with clipping={style!r}: expected a {kind.__name__}, of {known}.")


def _positive(name: str, value: float, *, most: float, such_as: float) -> None:
    if not 0 < number(name, value) <= most:
        raise ValueError(f"{name}={value}: expected a number above 0 and at most {most:g}, such as {such_as}.")


def _moved(clip_norm: float, by: float) -> float:
    """C·exp(by), within what a clip norm can be."""
    log = min(max(math.log(clip_norm) + by, math.log(SMALLEST_CLIP_NORM)), -math.log(SMALLEST_CLIP_NORM))
    return min(max(math.exp(log), SMALLEST_CLIP_NORM), 1.0 / SMALLEST_CLIP_NORM)
