"""A classifier of images around any network, to train with or without privacy."""

from __future__ import annotations

from fnmatch import fnmatchcase
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from lightning_dp.models.public_weights import classifier_name, load_public_weights


def plain_sgd(parameters: object, lr: float = 2.0) -> torch.optim.SGD:
    """SGD without momentum and weight decay, which De et al. (2022) use throughout."""
    return torch.optim.SGD(parameters, lr=lr)  # type: ignore[arg-type]  # what module.parameters() gives


class ImageClassifier(L.LightningModule):
    """Cross-entropy on the logits of ``network``. Nothing in it knows about privacy.

    Logged: ``train/loss`` at every step, ``train/accuracy`` over an epoch, ``val/loss`` and ``val/accuracy``
    (``test/...`` under ``test``). Accuracies are the share of examples (in training: of views) whose largest logit is
    the right one, in [0, 1].

    Args:
        network: maps images ``(batch, channels, height, width)`` to logits ``(batch, num_classes)``.
        num_classes: the number of classes.
        optimizer: makes the optimizer from the parameters to train; in YAML a ``class_path`` with ``init_args``.
        lr_scheduler: makes a scheduler from the optimizer, stepped after every optimizer step; ``None`` for a constant
            rate.
        train: ``"all"`` parameters of the network, its ``"last_layer"``, or those whose names match a pattern such as
            ``"stages.2.*"`` (several separated by commas). The others are frozen.
        init_from: public weights to start from, a file or a model of timm; see
            :func:`lightning_dp.models.public_weights.load_public_weights`. Read when the object is made, so for a
            finished run that is only evaluated give ``None``.
        reset_classifier: with ``init_from``, leave the last linear layer as it was initialised.
        channels_last: keep kernels with channels as the innermost axis (``torch.channels_last``), as tensor cores want them.
            Changes speed and memory, never the result beyond rounding.

    Raises:
        ValueError: a pattern matches no parameter, or ``train="last_layer"`` although there is no linear layer.
        WeightsError: the weights do not fit; the names are listed.
        FileNotFoundError: there is no such file of weights.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        >>> ImageClassifier(network, num_classes=3, train="last_layer")(torch.zeros(2, 3, 2, 2)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int = 10,
        optimizer: OptimizerCallable = plain_sgd,
        lr_scheduler: LRSchedulerCallable | None = None,
        train: str = "all",
        init_from: str | Path | None = None,
        reset_classifier: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        if init_from is not None:
            load_public_weights(network, init_from, reset_classifier=reset_classifier)
        train_only(network, train)
        if channels_last:
            network.to(memory_format=torch.channels_last)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits."""
        logits: Tensor = self.network(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch of images and labels."""
        images, labels = batch
        logits = self(images)
        loss = F.cross_entropy(logits, labels)
        self.train_accuracy(logits, labels)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.train_accuracy, on_step=False, on_epoch=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate(batch, "val", self.val_accuracy)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        self._evaluate(batch, "test", self.test_accuracy)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the predicted class of each image, shape ``(batch,)``."""
        predicted: Tensor = self(batch[0]).argmax(dim=1)
        return predicted

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the trained parameters, and the scheduler if one was given."""
        optimizer = self.optimizer([p for p in self.network.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": scheduler.monitor}}
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _evaluate(self, batch: tuple[Tensor, Tensor], stage: str, accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        logits = self(images)
        accuracy(logits, labels)
        self.log(f"{stage}/loss", F.cross_entropy(logits, labels))
        self.log(f"{stage}/accuracy", accuracy, prog_bar=True)


def train_only(network: nn.Module, train: str) -> list[str]:
    """Freeze all parameters of ``network`` but those that ``train`` names; return the names of the others.

    Args:
        network: is changed in place.
        train: ``"all"``, ``"last_layer"``, or patterns of parameter names (``*``, ``?``, ``[...]``), separated by commas.

    Raises:
        ValueError: a pattern matches no parameter.
    """
    names = [name for name, _ in network.named_parameters()]
    if train == "all":
        patterns = ["*"]
    elif train == "last_layer":
        patterns = [f"{classifier_name(network)}.*"]
    else:
        patterns = [pattern.strip() for pattern in train.split(",")]
    idle = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise ValueError(
            f"train={train!r}: {', '.join(map(repr, idle))} matches no parameter; expected 'all', 'last_layer' or patterns "
            f"of names such as {names[0]!r} and {names[-1]!r}. print([n for n, _ in network.named_parameters()]) lists them."
        )
    chosen = {name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    return [name for name in names if name in chosen]
