"""Attention of one's own and torch's, with every mask, against one plain backward pass per example."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.engines.against_loop import agree, build


class Own(nn.Module):
    """Self-attention with layers of its own and torch's kernel."""

    def __init__(self, causal: bool, masked: bool) -> None:
        super().__init__()
        self.qkv, self.out, self.causal, self.masked = nn.Linear(6, 18), nn.Linear(6, 6), causal, masked

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 3)).movedim(-3, 0).transpose(2, 3)
        mask = (x.sum(-1) < 2)[:, None, None] if self.masked else None
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(attended.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("causal", "masked"), [(False, False), (True, False), (False, True)])
def test_attention_with_a_padding_mask(causal: bool, masked: bool, recwarn: pytest.WarningsRecorder) -> None:
    agree(*build(lambda: Own(causal, masked), 0, 3, 5, 6))
    assert not recwarn.list  # torch would warn that it loops over the examples


class Multihead(nn.Module):
    """torch's own attention in every way it can be called."""

    def __init__(self, cross: bool, need_weights: bool, masks: str, **options: Any) -> None:
        super().__init__()
        self.attention, self.source = nn.MultiheadAttention(6, 2, **options), nn.Linear(6, 6)
        self.cross, self.need_weights, self.masks = cross, need_weights, masks

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.attention.batch_first else x.transpose(0, 1)
        source = self.source(x) if self.cross else x
        padding = torch.zeros(x.shape[0 if self.attention.batch_first else 1], 5, dtype=torch.bool, device=x.device)
        padding[:, 3:] = "padding" in self.masks
        causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
        causal = torch.zeros(5, 5, dtype=x.dtype).masked_fill(causal, -math.inf) if "float" in self.masks else causal
        causal = causal.expand(2 * len(padding), 5, 5) if "heads" in self.masks else causal
        attended, weights = self.attention(
            x, source, source.tanh() if self.cross else x, need_weights=self.need_weights,
            key_padding_mask=padding if "padding" in self.masks and "float" not in self.masks else None,
            attn_mask=causal if "causal" in self.masks else None, average_attn_weights="heads" not in self.masks,
        )  # fmt: skip
        attended = attended if self.attention.batch_first else attended.transpose(0, 1)
        return attended if weights is None else attended * weights.square().sum((-1, -2)).reshape(1, -1)[:, :1, None]


@pytest.mark.parametrize("masks", ["", "causal", "causal padding", "causal float", "padding", "causal heads"])
@pytest.mark.parametrize(("cross", "batch_first", "need_weights", "bias"), [
    (False, True, False, True), (False, False, True, True), (True, True, True, False), (True, False, False, True),
])  # fmt: skip
def test_multihead_attention(cross: bool, batch_first: bool, need_weights: bool, bias: bool, masks: str) -> None:
    module, x = build(lambda: Multihead(cross, need_weights, masks, batch_first=batch_first, bias=bias), 0, 3, 5, 6)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "There is a performance drop"
        )  # of the loop over the whole module, below vmap
        engine = agree(module, x)
    assert (
        engine.handled["attention.in_proj_weight"]
        == engine.handled["attention.out_proj.weight"]
        == "MultiheadAttention"
    )


@pytest.mark.parametrize("options", [{"kdim": 6, "vdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}])
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_multihead_attention_with_features_that_the_rule_does_not_know(options: dict[str, Any]) -> None:
    class Rare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.values = (
                nn.MultiheadAttention(6, 2, batch_first=True, **options),
                nn.Linear(6, options.get("vdim", 6)),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, self.values(x), need_weights=False)[0]

    agree(*build(Rare, 0, 3, 5, 6))
