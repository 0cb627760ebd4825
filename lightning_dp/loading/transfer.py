"""Lightning's own transfer of a batch to the device leaves a logical batch alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_dp.lightning_internals import BEFORE_TRANSFER, attribute
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.mechanism.instead import Instead


def let_logical_batches_through(module: pl.LightningModule) -> None:
    """Spare the user's ``on_before_batch_transfer`` the logical batch; its micro-batches go through it one by one."""
    original = attribute(type(module), BEFORE_TRANSFER)

    def hook(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, LogicalBatch) else original(module, batch, dataloader_idx)

    module.__dict__[BEFORE_TRANSFER] = Instead(module, BEFORE_TRANSFER, hook)


def stop_letting_through(module: pl.LightningModule) -> None:
    """Leave the module as it was before :func:`let_logical_batches_through`."""
    module.__dict__.pop(BEFORE_TRANSFER, None)
