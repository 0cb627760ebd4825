"""Small models of every kind that reads its parameters in its own way, each with data and a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.engines.protocol import LossFunction


@dataclass
class Case:
    """A model, a batch, and how the loss of a batch is computed from the model's output."""

    module: nn.Module
    batch: Any
    examples: int
    loss: Callable[[Any, Any], Tensor]

    def parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def loss_function(self) -> LossFunction:
        def loss_function(parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Any]:
            output = functional_call(self.module, dict(parameters), (batch[0],))
            return self.loss(output, batch[1]), {"output": output}

        return loss_function


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens))).mean(1)


class Reused(nn.Module):
    """One layer, applied three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.layer(x))
        return self.head(x)


class Unused(nn.Module):
    """A layer that nobody calls, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.idle, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 3)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.frozen(x)))


class Temperature(nn.Module):
    """A parameter that is a single number, as in CLIP."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.log_scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x) * self.log_scale.exp()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = nn.MultiheadAttention(4, 2, batch_first=True), nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mixed, _ = self.attention(x, x, x, need_weights=False)
        return self.head(self.norm(x + mixed).mean(1))


class Recurrent(nn.Module):
    """With projected states, which no engine but the loop can run."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(4, 4, batch_first=True, proj_size=3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ELU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 1, groups=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 5, padding_idx=0), nn.Flatten(), nn.Linear(15, 3))


def weight_normed() -> nn.Module:
    return nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)
    )


FAMILY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (mlp, "vectors"),
    "convolution and GroupNorm": (convolutional, "images"),
    "embedding": (embedding, "tokens"),
    "tied weights": (Tied, "tokens"),
    "reused layer": (Reused, "vectors"),
    "unused and frozen parameters": (Unused, "vectors"),
    "scalar parameter": (Temperature, "vectors"),
    "weight norm and LayerNorm": (weight_normed, "vectors"),
    "attention": (Attention, "sequences"),
}


def case(name: str, examples: int, seed: int, dtype: torch.dtype = torch.float64) -> Case:
    """A member of the family with weights and data drawn from ``seed``."""
    make, kind = {**FAMILY, "recurrent": (Recurrent, "sequences")}[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = make().to(dtype)
        inputs = {
            "vectors": lambda: torch.randn(examples, 4, dtype=dtype),
            "images": lambda: torch.randn(examples, 2, 6, 6, dtype=dtype),
            "tokens": lambda: torch.randint(7, (examples, 3)),
            "sequences": lambda: torch.randn(examples, 3, 4, dtype=dtype),
        }[kind]()
        targets = torch.randint(3, (examples,))
    return Case(module, (inputs, targets), examples, F.cross_entropy)
