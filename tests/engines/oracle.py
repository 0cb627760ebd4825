"""Clipped sums by plain backward passes over batches of one: nothing of the package is used."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.engines.family import Case


def per_example(case: Case, index: int) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of one example, as anybody would compute them."""
    inputs, targets = case.batch
    case.module.zero_grad()
    loss = case.loss(case.module(inputs[index : index + 1]), targets[index : index + 1])
    loss.backward()
    gradient = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in case.parameters().items()
    }
    case.module.zero_grad()
    return gradient, loss.item()


def clipped_sum(
    case: Case, clip_norm: float, indices: Any = None
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The sum of clipped gradients, the norms before clipping, and the losses."""
    total = {name: torch.zeros_like(p) for name, p in case.parameters().items()}
    norms, losses = [], []
    for index in range(case.examples) if indices is None else indices:
        gradient, loss = per_example(case, index)
        norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradient.values()))
        for name, g in gradient.items():
            total[name] += g * min(1.0, clip_norm / norm if norm else 1.0)
        norms.append(norm)
        losses.append(loss)
    return total, norms, losses
