"""Below vmap: a computation on all examples at once, in ordinary tensors with ordinary autograd.

``torch.autograd.Function`` with a rule for vmap does the same and more, at half a millisecond a call, which is what a small
layer costs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack


def below_vmap(compute: Callable[..., Tensor], tensors: tuple[Tensor, ...], witness: Tensor) -> Tensor | None:
    """What ``compute`` gives for the rows of all examples, as a tensor under vmap again.

    Args:
        compute: takes the tensors' values with a leading axis of B, and gives a tensor with such an axis.
        tensors: as the training step sees them, under vmap; those that do not depend on the example are repeated.
        witness: a tensor that the engine's own vmap maps over.

    Returns:
        ``None`` if the engine's vmap is not the only transform around the call: somebody else has to sort that out.
    """
    stack = _functorch.get_interpreter_stack()
    if stack is None or len(stack) != 1 or not _functorch.is_batchedtensor(witness):
        return None
    level = _functorch.maybe_get_level(witness)
    plain, axis = _functorch.get_unwrapped(witness), _functorch.maybe_get_bdim(witness)
    examples, rows = plain.shape[axis], []
    for tensor in tensors:
        value, own = tensor, None
        if _functorch.is_batchedtensor(tensor) and _functorch.maybe_get_level(tensor) == level:
            value, own = _functorch.get_unwrapped(tensor), _functorch.maybe_get_bdim(tensor)
        if _functorch.is_functorch_wrapped_tensor(value):
            return None
        rows.append((value, own))
    with temporarily_clear_interpreter_stack(), torch._C.DisableTorchFunction():
        output = compute(*(examples_first(value, own, examples) for value, own in rows))
    mapped: Tensor = _functorch._add_batch_dim(output, 0, level)
    return mapped


def examples_first(rows: Tensor, axis: int | None, examples: int) -> Tensor:
    """``rows`` with its axis of examples in front; repeated, without memory, if it has none."""
    return rows.expand(examples, *rows.shape) if axis is None else rows.movedim(axis, 0)
