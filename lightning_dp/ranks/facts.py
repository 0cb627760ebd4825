"""Short questions to a Lightning strategy: its module, what is trainable in it, and which rank this is."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy
from torch import nn


def module_of(strategy: Strategy) -> pl.LightningModule:
    """The LightningModule in training."""
    module = strategy.lightning_module
    assert module is not None
    return module


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are clipped, noised and stepped, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def rank_of(strategy: Strategy) -> int:
    """This process's number among all processes of the run, 0 without several."""
    return int(getattr(strategy, "global_rank", 0))


def world_size_of(strategy: Strategy) -> int:
    """How many processes train together."""
    return int(getattr(strategy, "world_size", 1))
