"""The clipping styles as plain public numbers: what an example may add to the sum, and how that is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_dp.plan.adaptation import (
    KINDS,
    SMALLEST_CLIP_NORM,
    Adaptation,
    Quantile,
    Slack,
    adaptation_of,
    check_adaptation,
)
from lightning_dp.validate import number, shown

ClippingStyle = Literal["flat", "per_layer", "automatic", "quantile", "slaclip"]
DEFAULT_GAMMA = 0.01
"""γ of the automatic style, as in the experiments of its authors."""
SMALLEST_GAMMA = 1e-12
"""Below it g·C/(‖g‖+γ) is no longer bounded where the norm, a sum of squares in float32, comes out as 0."""


@dataclass(frozen=True, slots=True)
class Clipping:
    """How an example's gradient g, of all trainable parameters, is bounded before it enters the sum.

    | style | what enters the sum | its norm is at most |
    |---|---|---|
    | ``flat`` | g·min(1, C/‖g‖) | C |
    | ``per_layer`` | for each of the L layers, g_l·min(1, (C/√L)/‖g_l‖) | (L·(C/√L)²)^½ = C |
    | ``automatic`` | g·C/(‖g‖ + γ) | C·‖g‖/(‖g‖ + γ) < C |
    | ``quantile`` | g·min(1, C/‖g‖) and one coordinate that says whether ‖g‖ ≤ C | C·(1 + κ²/4)^½ |
    | ``slaclip`` | g·min(1, C/‖g‖) and K coordinates that say by how much ‖g‖ < C | C |

    In the last two C is adapted from step to step, and what is said here holds with the C of the step, see
    :mod:`lightning_dp.plan.adaptation`. Under every style a gradient that is not finite, in whatever layer, enters as zero. L
    and the layers follow from the parameters' names alone, so they are public.

    Args:
        clip_norm: C > 0, at first if it is adapted; ``inf`` for no clipping (with ``flat`` and ``per_layer`` alone).
        style: one of the five.
        gamma: γ > 0 of ``automatic``: gradients much shorter than γ stay shorter than C. Without meaning elsewhere.
        adaptation: what adapts C; ``None`` for the style's own with its defaults, which is nothing in the first three.

    Raises:
        ValueError: a number or the style is not one of these.

    Example:
        >>> Clipping(1.0, "per_layer").budget(layers=4), Clipping(1.0, "per_layer").sensitivity
        (0.5, 1.0)

    Source: flat: Abadi et al. 2016, Algorithm 1 (arXiv 1607.00133). Per layer with equal shares: McMahan, Ramage, Talwar,
    Zhang 2018 (arXiv 1710.06963), section 3.1. Automatic: Bu, Wang, Zha, Karypis 2022 (arXiv 2206.07136), "AUTO-S".
    """

    clip_norm: float
    style: ClippingStyle = "flat"
    gamma: float = DEFAULT_GAMMA
    adaptation: Adaptation | None = None

    def __post_init__(self) -> None:
        check_clip_norm(self.clip_norm)
        check_clipping(self.style, self.gamma, self.clip_norm)
        if self.adaptation is None:
            object.__setattr__(self, "adaptation", adaptation_of(self.style))
        check_adaptation(self.adaptation, self.style)

    @property
    def sensitivity(self) -> float:
        """The most by which adding or removing one example moves the sum, in L2 norm; the noise is scaled from it."""
        return self.clip_norm if self.adaptation is None else self.clip_norm * self.adaptation.stretch

    @property
    def coordinates(self) -> int:
        """How many coordinates each example has beside its gradient."""
        return 0 if self.adaptation is None else self.adaptation.coordinates

    def budget(self, layers: int) -> float:
        """The norm that one layer's part of a gradient is held to, if there are ``layers`` of them."""
        return self.clip_norm / math.sqrt(layers) if self.style == "per_layer" else self.clip_norm

    def layers(self, names: Iterable[str]) -> dict[str, str]:
        """Parameter name → the layer it is clipped with. One layer for all unless the style is ``per_layer``.

        Args:
            names: of *all* trainable parameters, used in the loss or not.
        """
        return {name: layer_of(name) if self.style == "per_layer" else "" for name in names}

    def __str__(self) -> str:
        if self.style == "automatic":
            return f"automatic clipping, gamma {self.gamma:g}"
        if isinstance(self.adaptation, Quantile):
            return f"at first; it follows the {self.adaptation.target:g} quantile of norms"
        if isinstance(self.adaptation, Slack):
            return f"at first; SlaClip adapts it from {self.adaptation.bins} bins"
        return f"{self.style.replace('_', '-')} clipping"


def as_clipping(clipping: Clipping | float) -> Clipping:
    """``clipping`` itself, or flat clipping to that norm."""
    return clipping if isinstance(clipping, Clipping) else Clipping(float(clipping))


def layer_of(name: str) -> str:
    """The layer of a parameter: the module that owns it.

    What a module's weight is computed from (``torch.nn.utils.parametrize``) belongs to that module. A parameter that
    several modules share has one name, the first, and so one layer.

    Example:
        >>> layer_of("net.0.weight"), layer_of("net.0.parametrizations.weight.original0"), layer_of("scale")
        ('net.0', 'net.0', '')
    """
    path = name.split(".")
    end = path.index("parametrizations") if "parametrizations" in path else len(path) - 1
    return ".".join(path[:end])


def check_clipping(style: str, gamma: float, clip_norm: float) -> None:
    """Raise ``ValueError`` unless ``style`` is one of :data:`ClippingStyle` and the numbers go with it."""
    if not isinstance(style, str) or style not in get_args(ClippingStyle):
        raise ValueError(f"clipping={shown(style)}: expected one of {', '.join(get_args(ClippingStyle))}.")
    number("automatic_gamma", gamma)
    if not (gamma > 0 and math.isfinite(gamma)):
        raise ValueError(f"automatic_gamma={gamma}: expected a finite number above 0, such as {DEFAULT_GAMMA}.")
    if gamma < SMALLEST_GAMMA:
        raise ValueError(
            f"automatic_gamma={gamma}: expected at least {SMALLEST_GAMMA:g}, such as {DEFAULT_GAMMA}: norms are float32, and a "
            "gradient whose square is too small for one would be scaled up beyond the clip norm."
        )
    if style == "automatic" and math.isinf(clip_norm):
        raise ValueError(
            f"clipping='automatic' with clip_norm={clip_norm}: expected a finite clip norm. Every gradient is scaled to "
            "about that norm; give one, or clipping='flat' to train without clipping."
        )
    if style in KINDS and math.isinf(clip_norm):
        raise ValueError(
            f"clipping={style!r} with clip_norm={clip_norm}: expected a finite clip norm to begin with, such as 1.0, or "
            "clipping='flat' to train without clipping."
        )


def check_clip_norm(clip_norm: float) -> None:
    """Raise ``ValueError`` unless ``clip_norm`` is above 0 (``inf`` is accepted) and suits float32.

    Noise of a standard deviation near the smallest float32 would be rounded to a few values.
    """
    if not number("clip_norm", clip_norm) > 0:
        raise ValueError(f"clip_norm={clip_norm}: expected a number above 0, such as 1.0.")
    if clip_norm != math.inf and not SMALLEST_CLIP_NORM <= clip_norm <= 1 / SMALLEST_CLIP_NORM:
        raise ValueError(
            f"clip_norm={clip_norm}: expected a number from {SMALLEST_CLIP_NORM:g} to {1 / SMALLEST_CLIP_NORM:g}, such as 1.0: "
            "sums and noise are float32. Scale the loss instead."
        )
