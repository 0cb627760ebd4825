"""One example's gradient by a plain backward pass, as training without privacy would take it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from lightning_dp.engines.drawing import Draws
from lightning_dp.engines.protocol import LossFunction, scalar_loss

_until_backward: ContextVar[ExitStack | None] = ContextVar("_until_backward", default=None)


@contextmanager
def in_place() -> Iterator[ExitStack]:
    """Where a loss function enters the contexts in which its module computes.

    They close at the end of the call, or, if a backward pass follows in :func:`plain_gradient`, after that: what runs a
    part of the forward pass again in the backward pass (activation checkpointing) has to find the same parameters.
    """
    open_until_backward = _until_backward.get()
    if open_until_backward is not None:
        yield open_until_backward
        return
    with ExitStack() as stack:
        yield stack


def backward_follows() -> bool:
    """Whether the loss function that asks is followed by the backward pass of :func:`plain_gradient`."""
    return _until_backward.get() is not None


def plain_gradient(
    loss_function: LossFunction, leaves: Mapping[str, Tensor], example: Any, draws: Draws = nullcontext
) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Loss, outputs, and gradient of one example, by ``loss.backward()``.

    A ``backward()`` reaches whatever the loss depends on. Asking autograd for the gradients of certain tensors would pass by
    what reentrant checkpointing hides from the graph, and that would read as a gradient of zero.

    Args:
        loss_function: the loss of a batch of one.
        leaves: by name, leaf tensors that require a gradient. Their ``.grad`` and their hooks are left as they are.
        example: a batch of one.
        draws: a context in which both passes run.

    Returns:
        The loss without its graph, the outputs, and for each leaf a dense gradient (zero if the loss does not depend on it).
    """
    with ExitStack() as stack, torch.enable_grad():
        stack.enter_context(hooks_at_rest(leaves.values()))
        stack.enter_context(gradients_kept(leaves.values()))
        stack.enter_context(draws())
        token = _until_backward.set(stack)
        try:
            loss, outputs = loss_function(leaves, example)
        finally:
            _until_backward.reset(token)
        loss = scalar_loss(loss)
        for leaf in leaves.values():
            leaf.grad = None
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        gradient = {name: _dense(leaf) for name, leaf in leaves.items()}
    return loss.detach(), outputs, gradient


@contextmanager
def gradients_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The same ``.grad`` before and after, for tensors that a backward pass in between may reach."""
    before = [(tensor, tensor.grad) for tensor in tensors]
    try:
        yield
    finally:
        for tensor, gradient in before:
            fits = gradient is None or (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)
            tensor.grad = (
                gradient if fits else None
            )  # whoever gave it other memory is refused, and that is the error to see


@contextmanager
def hooks_at_rest(tensors: Iterable[Tensor]) -> Iterator[None]:
    """While open, hooks on these tensors' gradients do not run.

    They are for the gradient that is released, see :mod:`lightning_dp.step.parameter_hooks`.
    """
    tables = [table for tensor in tensors for table in _tables(tensor)]
    before = [dict(table) for table in tables]
    try:
        for table in tables:
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.update(hooks)


def has_hooks(tensor: Tensor) -> bool:
    """Whether anybody has registered a hook on the gradient of this tensor."""
    return any(len(table) > 0 for table in _tables(tensor))


def _tables(tensor: Tensor) -> list[dict[int, Any]]:
    found = (getattr(tensor, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))
    return [table for table in found if table is not None]


def _dense(leaf: Tensor) -> Tensor:
    if leaf.grad is None:
        return torch.zeros_like(leaf, requires_grad=False)
    return leaf.grad.to_dense() if leaf.grad.is_sparse else leaf.grad.detach()
