"""Writes of a training step into a tensor that was there before, and that all examples would share.

Under vmap torch refuses to write what depends on an example into a tensor that does not. Such a tensor may be one that
training_step has made itself, and then one example at a time is right; or one that was there before, and then the next
example would read what this one has left. Torch's error does not tell which. What is within reach of the module is compared
after every pass; this looks for the rest, such as a tensor that another library keeps.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_dp.engines.explain import WRITES
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.user_code import is_of_this_package, is_of_torch, line_of_the_caller
from lightning_dp.errors import PreflightError


class SharedWriteError(PreflightError):
    """training_step writes into a tensor that was there before it ran, and is not within reach of its module."""


def tells_of_a_write(error: BaseException) -> bool:
    """Whether an engine has stopped because something that all examples share would be written to."""
    text = str(error).lower()
    return any(part in text for part in WRITES)


def refusing_writes(loss_function: LossFunction, batch: Any, within_reach: Iterable[Tensor]) -> LossFunction:
    """The loss function, which now raises where it writes into a tensor that is there already.

    Args:
        loss_function: of a batch of one.
        batch: that examples are taken from, which may be written to: each is a copy, or its own part.
        within_reach: tensors that somebody else compares.

    Raises:
        SharedWriteError: from the function.
    """
    known = [*within_reach, *(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))]
    gradients = [one.grad for one in known if one.is_leaf and one.grad is not None]  # put back after each pass
    watch = _Watch([*known, *gradients])

    def watched(parameters: Mapping[str, Tensor], example: Any) -> tuple[Tensor, Any]:
        with watch:
            return loss_function(parameters, example)

    return watched


class _Watch(TorchFunctionMode):
    """Refuses in-place writes into tensors that were there when it was made.

    Args:
        but: tensors that may be written to as far as this is concerned.
    """

    def __init__(self, but: Iterable[Tensor]) -> None:
        super().__init__()
        left_out = {_address(tensor) for tensor in but}
        alive = [one for one in gc.get_objects() if type(one) in (Tensor, nn.Parameter)]
        self._memory = [
            one.untyped_storage() for one in alive if _address(one) is not None
        ]  # so that none is used again
        self._addresses = {memory.data_ptr() for memory in self._memory} - left_out

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        target = kwargs.get("out", args[0] if args and _writes(func) else None)
        for one in target if isinstance(target, (list, tuple)) else (target,):
            if isinstance(one, Tensor) and _address(one) in self._addresses and not _is_our_own():
                line = line_of_the_caller()
                raise SharedWriteError(
                    f"training_step writes in place into a tensor that was there before it ran"
                    f"{'' if line is None else f' ({line})'}: expected it to write into tensors that it has made itself. It "
                    "runs once for each example, and the next example would read what this one has left there. Make the "
                    "tensor inside training_step, with new_zeros or zeros_like of one that depends on the example, and count "
                    "with self.log or a torchmetrics object."
                )
        return func(*args, **kwargs)


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name in _SETTERS or name.startswith("__i")


_SETTERS = {"__set__", "__setitem__"}


def _is_our_own() -> bool:
    """Whether this package itself, and not the user's code or a layer of torch's under it, makes the call under way."""
    frame = sys._getframe(2)
    while is_of_torch(frame.f_code.co_filename) and frame.f_back is not None:
        frame = frame.f_back
    return is_of_this_package(frame.f_code.co_filename)


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):  # it has none of its own
        return None
