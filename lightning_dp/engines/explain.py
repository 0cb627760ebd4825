"""Why an engine cannot run a training step, in words that point at the line to change."""

from __future__ import annotations

import torch
from torch import nn

from lightning_dp.engines.user_code import layer_of_error, line_of_error

ALONE = "lightning_dp runs training_step for each example on its own: it gets a batch of one, whose first axis has length 1."
"""A note on what the user's own code raises."""

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""Raised for want of memory: no limit of an engine, and nothing that another line would mend."""

CAUSES = {
    "data-dependent control flow": "it takes an example's value into Python, which must be the same for all at once",
    "calling .item() on a tensor": "it takes an example's value into Python, which must be the same for all at once",
    "one_hot": "one_hot without num_classes looks at the values; give num_classes",
    "dynamic shape": "the shape of a tensor depends on an example's values",
    "data-dependent and may differ": "the shape of a tensor depends on an example's values",
    "cannot access data pointer": "it hands a tensor to code outside torch (NumPy, or an operator written in C++)",
    "inplace arithmetic": "it writes an example's values in place into a tensor that all examples share; "
    "make that tensor with new_zeros or zeros_like of one that depends on the example",
    "in-place operation": "it changes in place a tensor that was made outside, such as a buffer",
    "doesn't match the broadcast shape": "it writes an example's values in place into a tensor that all examples share",
    "batching rule not implemented": "torch cannot run this operator for many examples at once",
    "requires_grad_()": "it takes gradients of its own with autograd; torch.func.grad would do",
    "accessing `data`": "it uses tensor.data; use detach()",
}
"""What torch says, in part and in lower case → what it means."""


WRITES = (
    "inplace arithmetic",
    "in-place operation",
    "doesn't match the broadcast shape",
    "because there exists a tensor",
    "mutating directly with `.data`",
    "to the memory of a tensor that all examples share",
    "with one that all examples share",
)
"""What torch, or an engine, says of a write into a tensor that does not depend on the example while what is written does."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def explain(error: BaseException, module: nn.Module | None = None) -> str:
    """What stopped the trace, the user's own line, and the layer concerned.

    Args:
        error: what was raised while training_step ran under an engine.
        module: in which to look up the layer's name.

    Example:
        >>> explain(RuntimeError("Cannot access data pointer of Tensor that doesn't have storage"))
        'it hands a tensor to code outside torch (NumPy, or an operator written in C++)'
    """
    text = str(error)
    cause = next((ours for theirs, ours in CAUSES.items() if theirs in text.lower()), None)
    if cause is None:
        cause = first_line(error)
    line, layer = line_of_error(error), layer_of_error(error)
    if line is not None:
        cause += f" ({line}"
        name = next((name for name, one in module.named_modules() if one is layer), "") if module else ""
        cause += f", layer {name!r} of type {type(layer).__name__})" if name else ")"
    return cause
