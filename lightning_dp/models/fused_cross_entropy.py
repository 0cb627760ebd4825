"""Cross-entropy of a language model's hidden states, without the logits of all positions in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def fused_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 64, ignored: int = -100) -> Tensor:
    """The cross-entropy of each position, ``F.cross_entropy(hidden @ weight.T, labels, reduction="none")``.

    The logits are made for ``chunk`` positions at a time, in the forward pass, together with the gradient with respect to
    ``hidden``. What is kept is as large as ``hidden``: d numbers for each position instead of several times V, for V words.

    **The weight is not trained here**: it must not require a gradient, as the output layer of a frozen language model does
    not under LoRA or BitFit. A trained output layer needs each example's gradient of it, for which ``ghost`` has to see
    the layer's own call: use the logits there.

    Under ``torch.func.vmap``, and so under the engines ``ghost`` and ``vmap``, all examples' positions are taken together.

    Args:
        hidden: ``(..., d)``.
        weight: ``(V, d)``.
        labels: ``(...)``, int64.
        chunk: positions whose logits are in memory at once.
        ignored: the label of a position that counts for nothing; its loss is 0.

    Returns:
        ``(...)``, as ``hidden`` in type.

    Raises:
        ValueError: ``weight`` requires a gradient, or ``chunk`` is below 1.

    Example:
        >>> fused_cross_entropy(torch.zeros(2, 3, 4), torch.ones(5, 4), torch.zeros(2, 3).long()).shape
        torch.Size([2, 3])

    Source: P.-L. Hsu et al., *Liger Kernel*, 2024 (arXiv 2410.10989), section 3.2, for the gradient in the forward pass.
    """
    if weight.requires_grad:
        raise ValueError(
            "weight requires a gradient: expected a frozen output layer. Freeze it (LoRA, BitFit), or take the cross-entropy "
            "of the logits, chunk=0."
        )
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1. Give positions, such as 64.")
    losses: Tensor = _Fused.apply(hidden, weight, labels, chunk, ignored)[0]
    return losses


class _Fused(torch.autograd.Function):
    """Losses, and the gradient of their sum with respect to the hidden states, of one or of many examples."""

    @staticmethod
    def forward(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, ignored: int) -> tuple[Tensor, Tensor]:
        rows, words = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
        losses, gradients = rows.new_zeros(len(rows)), torch.empty_like(rows)
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            logits, wanted = F.linear(rows[part], weight), words[part]
            counts = wanted != ignored
            wanted = wanted.clamp(min=0)[:, None]
            logarithms = logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
            losses[part] = torch.where(counts, -logarithms.gather(1, wanted)[:, 0], 0).to(losses.dtype)
            shares = logarithms.exp_()
            shares.scatter_add_(1, wanted, -torch.ones_like(wanted, dtype=shares.dtype))
            gradients[part] = shares.mul_(counts[:, None]).to(rows.dtype) @ weight
        return losses.view(labels.shape), gradients.view(hidden.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None, None, None, None]:
        (of_hidden,) = ctx.saved_tensors
        return gradients[0].unsqueeze(-1) * of_hidden, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int, ignored: int) -> Any:
        def first(tensor: Tensor, place: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if place is None else tensor.movedim(place, 0)

        if in_dims[1] is not None:
            raise ValueError(
                "weight differs between examples: expected a frozen output layer. Freeze it, or use chunk=0."
            )
        found = _Fused.apply(first(hidden, in_dims[0]), weight, first(labels, in_dims[2]), chunk, ignored)
        return found, (0, 0)
