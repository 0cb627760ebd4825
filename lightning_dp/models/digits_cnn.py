"""A small convolutional network for 8x8 digits."""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override


class DigitsCNN(L.LightningModule):
    """Two 3x3 convolutions with group norm and a linear layer on all 4x4 places, trained with SGD.

    On images this small the place of a stroke tells the digit, so the linear layer reads the last feature map
    unpooled.

    Logged: ``train/loss`` at every step, ``train/accuracy`` over an epoch, ``val/loss`` and ``val/accuracy``
    (``test/...`` under ``test``). Accuracies are the share of examples classified rightly, in [0, 1].

    Args:
        width: channels of the first convolution; the second has twice as many.
        groups: groups of each group norm; they must divide ``width``.
        lr: the learning rate of SGD.
        momentum: the momentum of SGD.
        num_classes: the number of classes.

    Raises:
        ValueError: ``groups`` does not divide ``width``.

    Example:
        >>> DigitsCNN(width=16)(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])

    Source: Y. Wu and K. He, *Group Normalization*, ECCV 2018, for the normalisation.
    """

    def __init__(
        self,
        width: int = 16,
        groups: int = 4,
        lr: float = 1.0,
        momentum: float = 0.0,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        if width < 1 or groups < 1 or width % groups:
            raise ValueError(
                f"width={width} with groups={groups}: expected groups to divide width. "
                "Give a width that is a multiple of groups, such as width=16 with groups=4."
            )
        self.save_hyperparameters()
        self.lr = lr
        self.momentum = momentum
        self.example_input_array = torch.zeros(1, 1, 8, 8)  # for the summary, which otherwise says FLOPs 0
        self.net = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.GroupNorm(groups, 2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, num_classes),
        )
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images of shape ``(batch, 1, 8, 8)`` to logits of shape ``(batch, num_classes)``."""
        logits: Tensor = self.net(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of a batch."""
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
        images, labels = batch
        logits = self(images)
        self.val_accuracy(logits, labels)
        self.log("val/loss", F.cross_entropy(logits, labels))
        self.log("val/accuracy", self.val_accuracy, prog_bar=True)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/accuracy``."""
        images, labels = batch
        logits = self(images)
        self.test_accuracy(logits, labels)
        self.log("test/loss", F.cross_entropy(logits, labels))
        self.log("test/accuracy", self.test_accuracy)

    @override
    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the predicted class of each image, shape ``(batch,)``."""
        images, _ = batch
        predicted: Tensor = self(images).argmax(dim=1)
        return predicted

    @override
    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return plain SGD with the given learning rate and momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
