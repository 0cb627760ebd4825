"""How an optimizer learns the noise of its gradient: a number in its parameter groups, for one step."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

NOISE_STD = "noise_std"
"""The key in ``param_groups`` of those that want to know."""


def tell_noise_std(optimizer: Optimizer, noise_std: float) -> None:
    """Tell an optimizer the noise of the gradient that it steps on next; one that does not ask for it is left as it is.

    Any optimizer may ask for it, by having ``"noise_std": 0.0`` among its defaults.

    Args:
        optimizer: whose ``p.grad`` is about to be used.
        noise_std: the standard deviation of the noise on each (real) coordinate of ``p.grad``. Public.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> tell_noise_std(optimizer, 0.5), "noise_std" in optimizer.param_groups[0]
        (None, False)
    """
    for group in optimizer.param_groups:
        if NOISE_STD in group:
            group[NOISE_STD] = noise_std


def take_noise_std(group: dict[str, Any]) -> float:
    """What a group was told for this step; 0 if nobody told it. It is forgotten, so that it counts for one step alone.

    So a step that nobody tells about noise, of a public optimizer or of training without privacy that goes on from a private
    checkpoint, is a plain one.

    Example:
        >>> group = {"noise_std": 0.5}
        >>> take_noise_std(group), take_noise_std(group)
        (0.5, 0.0)
    """
    told = float(group[NOISE_STD])
    group[NOISE_STD] = 0.0
    return told
