"""The rule of ``nn.Embedding``: y = W[token]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Operation, Output
from lightning_dp.engines.ghost.contribution import Contribution, Factored, Grams, Written, gram
from lightning_dp.engines.ghost.registry import rule


@dataclass(frozen=True)
class Embedding:
    """∂W of an example has g_t added to the row of its t-th token; the padding token's row stays zero.

    Args:
        padding_idx: the token whose row is not trained, as ``nn.Embedding`` keeps it (not negative), or ``None``.
    """

    padding_idx: int | None

    takes_copies: ClassVar[bool] = False

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        assert weight is not None
        return Output(F.embedding(x.reshape(-1), weight, self.padding_idx), (*x.shape, weight.shape[1]))

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """See :class:`lightning_dp.engines.ghost.call.Operation`."""
        tokens = x.reshape(len(x), -1)
        g = g.reshape(len(x), -1, g.shape[-1])
        if self.padding_idx is not None:
            g = g.masked_fill((tokens == self.padding_idx).unsqueeze(-1), 0)
        words = len(weight)

        def rows(tokens: Tensor, g: Tensor) -> Tensor:
            offsets = words * torch.arange(len(tokens), device=tokens.device)
            flat = g.new_zeros(len(tokens) * words, g.shape[-1])
            flat.index_add_(0, (tokens + offsets[:, None]).flatten(), g.flatten(0, 1))
            return flat.view(len(tokens), words, g.shape[-1])

        def total(tokens: Tensor, g: Tensor) -> Tensor:
            return g.new_zeros(words, g.shape[-1]).index_add_(0, tokens.flatten(), g.flatten(0, 1))

        if 2 * tokens.shape[1] ** 2 < weight.numel():
            return Factored(tokens, g, norms=Grams(_positions, _write, 0, g.shape[2]), total=total, rows=rows)
        return Written(rows(tokens, g))

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """An embedding has none."""
        raise AssertionError("nn.Embedding has no bias")


@rule(nn.Embedding, when=lambda layer: layer.max_norm is None and not layer.scale_grad_by_freq)
def embedding(layer: nn.Embedding, x: Tensor) -> tuple[Operation, Tensor]:
    """``nn.Embedding`` that leaves its weight and its gradients as they are."""
    return Embedding(layer.padding_idx), x


def _positions(tokens: Tensor, g: Tensor) -> int:
    return tokens.shape[1]


def _write(tokens: Tensor, g: Tensor, of_tokens: Tensor, of_gradients: Tensor) -> None:
    torch.eq(tokens.unsqueeze(1), tokens.unsqueeze(2), out=of_tokens)
    gram(g, of_gradients)
