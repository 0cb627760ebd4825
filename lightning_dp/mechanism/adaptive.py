"""The coordinates that adapt the clip norm, beside each example's gradient, and the mechanism with the C that is in force."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_dp.mechanism.state import MechanismState
from lightning_dp.plan.adaptation import Quantile, Slack
from lightning_dp.plan.clipping import Clipping
from lightning_dp.plan.mechanism import Mechanism

INDICATOR = "what adapts the clip norm"
"""The name of these coordinates among the sums, behind all parameters."""
_KEY = "clipping"
"""Where the state holds what is adapted."""


def in_force(mechanism: Mechanism, state: MechanismState) -> Mechanism:
    """The mechanism of the next step: with the C that the state holds, if C is adapted.

    Its sensitivity and ``noise_std`` are those of the next step.

    Args:
        mechanism: of the plan, with C as it is at first.
        state: what was carried here. Of another clipping style nothing is taken over.

    Raises:
        ValueError: what the state holds is no clip norm.
    """
    adapted = state.values.get(_KEY)
    if mechanism.clipping.adaptation is None or adapted is None:
        return mechanism
    style = adapted.get("style") if isinstance(adapted, Mapping) else None
    clip_norm = adapted.get("clip_norm") if isinstance(adapted, Mapping) else None
    if not isinstance(style, str) or type(clip_norm) is not float or not math.isfinite(clip_norm):
        raise ValueError(
            f"the clip norm that the mechanism's state holds is {clip_norm!r}: expected a finite number. Resume from a "
            "checkpoint that is whole and unedited."
        )
    return mechanism if style != mechanism.clipping.style else mechanism.but(clip_norm=clip_norm)


def adapted(released: Tensor, mechanism: Mechanism, state: MechanismState) -> MechanismState:
    """The state with the C of the next step.

    Args:
        released: the noisy sums of the coordinates of :func:`beside`, over the divisor.
        mechanism: that released them.
        state: what was carried here.

    Raises:
        RuntimeError: what was released is not finite.

    Guarantee:
        Post-processing of what was released.
    """
    rule, values = mechanism.clipping.adaptation, [float(value) for value in released.double().cpu()]
    if rule is None:
        return state
    if not all(map(math.isfinite, values)):
        raise RuntimeError(
            f"what adapts the clip norm was released as {values}: expected finite numbers. Scale the loss, or give a smaller "
            "clip_norm to begin with."
        )
    after = rule.next_clip_norm(values, mechanism.clipping.clip_norm)
    return state.but(**{_KEY: {"style": mechanism.clipping.style, "clip_norm": after, "released": values}})


def released_beside(state: MechanismState) -> list[float]:
    """What was released beside the last gradient: the noisy sums of :func:`beside` over the divisor. Public.

    Empty if nothing was.
    """
    adapted = state.values.get(_KEY)
    return list(adapted["released"]) if isinstance(adapted, Mapping) else []


def beside(norms: Tensor, clipping: Clipping) -> Tensor:
    """Each example's coordinates beside its clipped gradient.

    Args:
        norms: L2 norms before clipping, ``(B,)``. **Private.**
        clipping: with the C in force.

    Returns:
        ``(B, K)``. Zeros for an example whose norm is not finite, which contributes nothing.

    Guarantee:
        The squared length of a row and of the example's clipped gradient, min(norm, C), add up to S² at most.

    Example:
        >>> beside(torch.tensor([0.5, 2.0]), Clipping(1.0, "quantile"))
        tensor([[ 0.1000],
                [-0.1000]])
        >>> beside(torch.tensor([0.0, 0.625, 2.0]), Clipping(1.0, "slaclip", adaptation=Slack(4)))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000],
                [0.5000, 0.2500, 0.0000, 0.0000],
                [0.0000, 0.0000, 0.0000, 0.0000]])
    """
    rule, c = clipping.adaptation, clipping.clip_norm
    if isinstance(rule, Quantile):
        below = (norms <= c).to(norms.dtype).unsqueeze(1)
        rows = (below - 0.5) * (rule.weight * c)
    elif isinstance(rule, Slack):
        filled = (rule.bins * (1 - norms / c)).unsqueeze(1) - torch.arange(rule.bins, device=norms.device)
        rows = filled.clamp(0.0, 1.0) * (c / math.sqrt(rule.bins))
    else:
        rows = norms.new_zeros(len(norms), 0)
    return torch.where(torch.isfinite(norms).unsqueeze(1), rows, 0.0)


def summed_beside(norms: Tensor, clipping: Clipping, counted: int | None = None) -> dict[str, Tensor]:
    """The sum of the rows of :func:`beside`, ``(K,)``, by its name; nothing if C is not adapted.

    Args:
        norms: as there.
        clipping: as there.
        counted: how many examples count; the others, at the end, are padding.
    """
    if not clipping.coordinates:
        return {}
    return {INDICATOR: beside(norms[:counted], clipping).sum(0)}


def nothing_beside(
    parameters: Mapping[str, Tensor], clipping: Clipping, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Zeros for the sums of :func:`beside`; nothing if C is not adapted.

    Args:
        parameters: whose gradients are summed.
        clipping: as there.
        dtype: of the sums; ``None`` for the accumulation type of the parameters.
    """
    if not clipping.coordinates:
        return {}
    device, wide = None, torch.float32
    for one in parameters.values():
        device, wide = one.device, torch.promote_types(wide, one.dtype)
    return {INDICATOR: torch.zeros(clipping.coordinates, dtype=dtype or wide, device=device)}
