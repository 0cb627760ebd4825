"""Train the last layer first and all layers afterwards."""

from __future__ import annotations

import lightning as L
import torch
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from typing_extensions import override

from lightning_dp.models.public_weights import classifier_name


class HeadFirst(BaseFinetuning):
    """For some epochs the last linear layer alone is trained, then all layers are.

    While the others are frozen the clip norm is spent on the last layer alone, and there is noise on its few coordinates only.
    An epoch is N / B steps, see ``docs/epochs.md``. What is thawed is private from that step on, with the learning rate that
    the last layer has then; every step is charged alike.

    Args:
        epochs: with the last layer alone.

    Raises:
        ValueError: ``epochs`` is below 1.
        WeightsError: when fit begins, if the module has no linear layer.

    Source: X. Tang, A. Panda, V. Sehwag and P. Mittal 2023 (arXiv 2306.06076), phases II and III.
    """

    def __init__(self, epochs: int) -> None:
        super().__init__()
        if epochs < 1:
            raise ValueError(
                f"epochs={epochs}: expected at least 1, such as 10. Leave the callback out to train all layers at once."
            )
        self.epochs = epochs

    @override
    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        """Freeze all layers but the last."""
        self.freeze(self._others(pl_module), train_bn=False)

    @override
    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        """Thaw them, once."""
        if epoch == self.epochs:
            self.unfreeze_and_add_param_group(
                self._others(pl_module), optimizer, lr=optimizer.param_groups[0]["lr"], initial_denom_lr=1
            )

    def _others(self, module: L.LightningModule) -> list[nn.Module]:
        """Modules with parameters of their own, but for the last linear layer."""
        last = classifier_name(module)
        return [
            m for name, m in module.named_modules() if name != last and any(True for _ in m.parameters(recurse=False))
        ]
