"""The rule of ``nn.MultiheadAttention``: three projections, attention, one more projection."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.call import Operand, Pass
from lightning_dp.engines.ghost.registry import Forward, composite_rule
from lightning_dp.engines.ghost.reparametrised import Leaves
from lightning_dp.engines.ghost.rules.linear import Linear


def _one_matrix(layer: nn.MultiheadAttention) -> bool:
    """Whether ``layer`` has one matrix for the three projections and appends nothing."""
    return (
        layer._qkv_same_embed_dim
        and layer.bias_k is None
        and layer.bias_v is None
        and not layer.add_zero_attn
        and "weight" in layer.out_proj._parameters
    )


@composite_rule(nn.MultiheadAttention, when=_one_matrix)
def multihead_attention(layer: nn.MultiheadAttention, names: Mapping[str, str], leaves: Leaves, of: Pass) -> Forward:
    """A forward pass for ``layer`` that keeps the books of its projections.

    Args:
        layer: one with one matrix for the three projections.
        names: the layer's trainable parameters, name in the layer (``out_proj.weight`` included) → name in the module.
        leaves: their plain values.
        of: the pass it belongs to.
    """
    heads = layer.num_heads

    def parameter(name: str) -> Tensor | None:
        if name in names:
            return leaves.by_name[names[name]]
        owner: Any = layer
        for part in name.split("."):
            owner = getattr(owner, part)
        return None if owner is None else owner.detach()

    def project(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        operands: list[Operand | None] = [leaves.operand(weight), leaves.operand(bias)]
        return of.call(Linear(), x, *operands)

    def projections(query: Tensor, key: Tensor, of_values: Tensor) -> list[Tensor]:
        weight, bias = parameter("in_proj_weight"), parameter("in_proj_bias")
        assert weight is not None
        if query is key and key is of_values:
            return list(torch.chunk(project(query, weight, bias), 3, dim=-1))
        parts = zip(
            (query, key, of_values),
            torch.chunk(weight, 3),
            (None,) * 3 if bias is None else torch.chunk(bias, 3),
            strict=True,
        )
        return [project(*part) for part in parts]

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "is_causal=True without attn_mask: expected the mask too, as nn.MultiheadAttention does."
            )
        q, k, v = projections(query, key, value)
        batch_first = layer.batch_first or query.ndim == 2
        # (N, T, E) or, without a batch axis, (T, E) → (…, heads, T, E / heads)
        q, k, v = ((t if batch_first else t.transpose(0, 1)) for t in (q, k, v))
        q, k, v = (t.reshape(*t.shape[:-1], heads, -1).transpose(-3, -2) for t in (q, k, v))
        mask = _mask(attn_mask, key_padding_mask, q)
        dropout = layer.dropout if layer.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
            weights = F.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = F.dropout(weights, dropout) if dropout else weights
            attended = weights @ v
            weights = weights.mean(-3) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        attended = attended.transpose(-3, -2).flatten(-2)
        output = project(attended, parameter("out_proj.weight"), parameter("out_proj.bias"))
        return (output if batch_first else output.transpose(0, 1)), weights

    return forward


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Both masks as numbers to add to the scores, or ``None``."""
    total = None if attn_mask is None else _additive(attn_mask, q)
    if total is not None and total.ndim == 3:  # (N · heads, T, S), or without a batch axis (heads, T, S)
        total = total.reshape(*q.shape[:-2], *total.shape[-2:])
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, q).unsqueeze(-2).unsqueeze(-2)  # (N, 1, 1, S) or (1, 1, S)
        total = padding if total is None else total + padding
    return total


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    if mask.is_floating_point():
        return mask.to(q.dtype)
    return torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)
