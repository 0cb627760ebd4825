"""Trainable parameters that get a gradient from no example, which a step moves by noise alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_dp.mechanism.adaptive import INDICATOR

STEPS = 3
"""Steps with examples after which it is said: a layer behind one that starts at zero (LoRA) has no gradient at first."""


class NeverMoved:
    """Names, in a warning, the trainable parameters whose gradients were all zero in the first steps.

    Whether a gradient is zero is learnt from private examples. So it is shown where the run was started, once, and goes
    into no log, no checkpoint and no record.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._names: set[str] | None = None

    def look(self, gradient: Mapping[str, Tensor], examples: int) -> None:
        """Take note of one step.

        Args:
            gradient: this rank's sum of clipped gradients.
            examples: how many it is of.
        """
        if self._steps == STEPS or not examples:
            return
        self._steps += 1
        parameters = gradient.keys() - {INDICATOR}
        still = parameters if self._names is None else self._names & parameters
        asked = sorted(still)
        moved = torch.stack([gradient[name].any() for name in asked]).tolist() if asked else []  # one wait for all
        self._names = {name for name, has_moved in zip(asked, moved, strict=True) if not has_moved}
        if self._steps == STEPS and self._names:
            names = sorted(self._names)
            rank_zero_warn(
                f"Trainable parameters that got no gradient from any example in {STEPS} steps: {', '.join(names[:5])}"
                f"{f' and {len(names) - 5} more' if len(names) > 5 else ''}. Noise alone moves them. If training_step is not "
                "meant to use them, freeze them with requires_grad_(False), which also leaves more of the clip norm's noise "
                "out; if it is, look for detach(), no_grad() or a .data on the way from them to the loss. (This was learnt "
                "from private examples: keep it to yourselves.)"
            )
