"""Cross-entropy of all examples at once by torch's own kernels; under vmap it takes ten calls, and its way back too."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp.engines.ghost.below import below_vmap

_Options = dict[str, Any]


def folded_cross_entropy(
    witness: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """``F.cross_entropy`` of each example, by one call for all of them.

    Of the mean, Σ_t ℓ_t / #{t: target_t is not ignored}, the quotient is each example's own.

    Args:
        witness: a tensor that the engine's own vmap maps over.
        input: as of ``F.cross_entropy``, and so are all others.
        target: likewise.
        weight: likewise.
        size_average: likewise.
        ignore_index: likewise.
        reduce: likewise.
        reduction: likewise.
        label_smoothing: likewise.

    Returns:
        ``None`` where torch has to do it: with weights of classes, targets that are probabilities, old arguments, or another
        transform around the call.
    """
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    return _folded(F.cross_entropy, witness, input, target, weight, (size_average, reduce), reduction, options)


def folded_nll(
    witness: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor | None:
    """``F.nll_loss`` of each example, likewise.

    Args:
        witness: a tensor that the engine's own vmap maps over.
        input: as of ``F.nll_loss``, and so are all others.
        target: likewise.
        weight: likewise.
        size_average: likewise.
        ignore_index: likewise.
        reduce: likewise.
        reduction: likewise.
    """
    options = {"ignore_index": ignore_index}
    return _folded(F.nll_loss, witness, input, target, weight, (size_average, reduce), reduction, options)


FOLDED: dict[Any, Callable[..., Tensor | None]] = {F.cross_entropy: folded_cross_entropy, F.nll_loss: folded_nll}
"""Loss of torch's → the same for all examples at once."""


def _folded(
    kernel: Callable[..., Tensor],
    witness: Tensor,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    old: tuple[Any, Any],
    reduction: str,
    options: _Options,
) -> Tensor | None:
    classes = not target.is_floating_point() and target.ndim == max(0, input.ndim - 1)
    if not classes or weight is not None or old != (None, None) or reduction not in ("none", "sum", "mean"):
        return None
    if not torch._C._functorch.is_batchedtensor(input):
        return None
    return below_vmap(partial(_of_all, kernel, reduction, options), (input, target), witness)


def _of_all(kernel: Callable[..., Tensor], reduction: str, options: _Options, input: Tensor, target: Tensor) -> Tensor:
    """The losses of all examples, ``(B, ...)`` or ``(B,)``."""
    shape = target.shape
    if target.ndim > 1:  # examples, and rows within each, in one axis; the classes stay on the second
        input, target = input.flatten(0, 1), target.flatten(0, 1)
    losses = kernel(input, target, reduction="none", **options).view(shape)
    if reduction == "none":
        return losses
    total = losses.flatten(1).sum(1) if losses.ndim > 1 else losses
    if reduction == "sum":
        return total
    counted = (target != options["ignore_index"]).view(shape)
    mean: Tensor = total / (counted.flatten(1).sum(1) if counted.ndim > 1 else counted)
    return mean
