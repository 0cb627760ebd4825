"""The models that ``benchmarks/engines.py`` times: the library's wide residual network, and transformers in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.models import WideResNet


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.inputs, self.outputs, self.heads, self.causal = (
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
            heads,
            causal,
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(2, 3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.outputs(attended.transpose(1, 2).flatten(2))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), _Attention(width, heads, causal))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class _Positions(nn.Module):
    """Adds sinusoids (Vaswani et al. 2017); nothing to train."""

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        rate = torch.exp(torch.arange(0, x.shape[2], 2, device=x.device, dtype=x.dtype) * (-math.log(1e4) / x.shape[2]))
        return x + torch.stack([torch.sin(position * rate), torch.cos(position * rate)], dim=-1).flatten(1)


class _Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vision_transformer(depth: int = 6, width: int = 192, heads: int = 3) -> nn.Module:
    """A small ViT for 32 × 32 images in patches of 4, averaged over positions."""
    layers = [_Layer(width, heads, causal=False) for _ in range(depth)]
    patches = [nn.Conv2d(3, width, 4, 4), nn.Flatten(2), _Transposed(), _Positions()]
    return nn.Sequential(*patches, *layers, nn.LayerNorm(width), _Pooled(), nn.Linear(width, 10))


class _Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def language_model(depth: int = 2, width: int = 128, heads: int = 4, words: int = 2000) -> nn.Module:
    """A causal transformer that predicts the next of ``words`` words."""
    layers = [_Layer(width, heads, causal=True) for _ in range(depth)]
    return nn.Sequential(
        nn.Embedding(words, width), _Positions(), *layers, nn.LayerNorm(width), nn.Linear(width, words)
    )


class _Lora(nn.Module):
    """A frozen linear layer and a trained product of rank r beside it (Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def with_lora(model: nn.Module, rank: int = 8) -> nn.Module:
    """Freeze a model, and put a product of rank ``rank`` beside every linear layer of its blocks."""
    model.requires_grad_(False)
    for block in (part for part in model.modules() if isinstance(part, _Layer)):
        for parent in list(block.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear) and not isinstance(parent, _Lora):
                    setattr(parent, name, _Lora(child, rank))
    return model


class _Recurrent(nn.Module):
    """An LSTM over a sequence, and a layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(32, 64, batch_first=True), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.cells(x)[0][:, -1])
        return found


def perceptron() -> nn.Module:
    """Three layers: what a step does with them is nearly all Python."""
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Task:
    """A model and random data for it.

    Attributes:
        model: makes the model.
        batch: batch size, views → inputs and targets; with views, inputs have them on the second axis.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, Tensor]]


def _images(size: int, views: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, views, 3, 32, 32), torch.randint(10, (size, 1)).expand(size, views)


def _sentences(size: int, views: int) -> tuple[Tensor, Tensor]:
    text = torch.randint(2000, (size, views, 65))
    return text[..., :-1], text[..., 1:]


def _rows(size: int, views: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, views, 32), torch.randint(10, (size, 1)).expand(size, views)


def _series(size: int, views: int) -> tuple[Tensor, Tensor]:
    return torch.randn(size, views, 24, 32), torch.randint(10, (size, 1)).expand(size, views)


TASKS = {
    "wrn": Task(lambda: WideResNet(16, 4, weight_standardisation=False), _images),
    "wrn-ws": Task(lambda: WideResNet(16, 4), _images),
    "wrn40-ws": Task(lambda: WideResNet(40, 4), _images),
    "vit": Task(vision_transformer, _images),
    "lm": Task(language_model, _sentences),
    "lm-lora": Task(lambda: with_lora(language_model()), _sentences),
    "lstm": Task(_Recurrent, _series),
    "mlp": Task(perceptron, _rows),
}


def loss_of(model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy over everything, or one number for each example with ``reduction="none"``."""
    output = model(inputs.flatten(0, 1))
    losses = F.cross_entropy(output.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.mean() if reduction == "mean" else losses.view(len(inputs), -1).mean(1)
