"""The module of a strategy."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy


def module_of(strategy: Strategy) -> pl.LightningModule:
    """The LightningModule in training."""
    module = strategy.lightning_module
    assert module is not None
    return module
