"""Hooks on a parameter's gradient, run on the gradient that is released."""

from __future__ import annotations

from torch import Tensor

from lightning_dp.engines.backward import has_hooks


def put_gradient(parameter: Tensor, gradient: Tensor) -> None:
    """Let ``gradient`` be the parameter's, by way of the hooks on it (``Tensor.register_hook`` and its relatives).

    A hook sees, once a step, the noisy gradient of the whole batch, as in training without privacy it sees the gradient of
    the whole batch. So a mask keeps rows from moving, a scale scales, a histogram shows what is public anyway, and whatever
    a hook does is computed from what was released. It does not change what is clipped.

    Args:
        parameter: a leaf that requires a gradient.
        gradient: in its shape and type.
    """
    if not has_hooks(parameter):
        parameter.grad = gradient
        return
    parameter.grad = None
    parameter.backward(gradient)  # type: ignore[no-untyped-call]  # torch leaves it untyped
