"""What training_step logs and returns after the last private step, when only the placeholder's values are at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.engines.late import Late
from lightning_dp.step.log_calls import LogCall
from lightning_dp.step.logs import StepCapture

_warnings = WarningCache()


@dataclass
class KnownLoss:
    """A loss of the placeholder, and what stands for it.

    Attributes:
        placeholder: as given to ``manual_backward``; public.
        value: the mean over the sample (**private**), or the loss itself where the step was public.
    """

    placeholder: Tensor
    value: Tensor

    def is_meant_by(self, value: Any) -> bool:
        """Whether ``value`` is this loss: the tensor, a detached one, or its number."""
        if type(value) is Late:
            value = value.computed  # of a loss it has been, by manual_backward
        if isinstance(value, Tensor):
            return value.numel() == 1 and value.data_ptr() == self.placeholder.data_ptr()
        return isinstance(value, float) and value == float(self.placeholder)


def log_late(capture: StepCapture, calls: Sequence[LogCall], known: Sequence[KnownLoss], examples: int) -> None:
    """Hand to Lightning what was logged after the last private step.

    Args:
        capture: which recorded the calls.
        calls: in order.
        known: the losses of the step.
        examples: how many examples the rank has in this step.
    """
    for call in calls:
        value = call.value
        if call.number:
            loss = _known(float(value), known)
            value = value if loss is None else loss  # the number of a loss, or one of the user's own
        elif isinstance(value, Tensor):
            value = _known(value, known)
        if value is None:
            _warnings.warn(
                f"self.log({call.name!r}, ...) after the last private step: its value is not known there (training_step ran "
                "on a batch of zeros) and is logged as NaN. Log it before opt.step(), or log the loss itself."
            )
            value = torch.full((), float("nan"))
        capture.log(replace(call, value=value), max(examples, 1))


def in_place_of(output: Any, known: Sequence[KnownLoss]) -> Any:
    """What training_step returned, with every known loss's value in its place and NaN for other tensors."""

    def real(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        value = _known(leaf, known)
        if type(leaf) is Late and value is None:
            return torch.full((), float("nan"))
        return torch.full_like(leaf, float("nan"), dtype=torch.float32, requires_grad=False) if value is None else value

    return pytree.tree_map(real, output)


def _known(value: Any, known: Sequence[KnownLoss]) -> Tensor | None:
    return next((one.value for one in reversed(known) if one.is_meant_by(value)), None)
