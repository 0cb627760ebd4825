"""Learn features without labels: two views of one image are to look alike, views of two images are not."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.public_weights import classifier_name


def adam(parameters: object, lr: float = 2e-3) -> torch.optim.Adam:
    """Adam, which needs no tuning here."""
    return torch.optim.Adam(parameters, lr=lr)  # type: ignore[arg-type]  # what module.parameters() gives


class ContrastivePretraining(L.LightningModule):
    """Train the layers of ``network`` before its last one so that views of the same image have similar features.

    **For public images alone**, such as :class:`~lightning_dp.data.RandomProcessImages`: the loss compares the images of a
    batch with one another, so no example has a gradient of its own, and :class:`~lightning_dp.DifferentialPrivacy` refuses it.

    With z the normalised output of a small network on the features, rows i and j views of one image, and m over all rows but i:
    loss = mean over i and j of −log(exp(z_i·z_j / τ) / Σ_m exp(z_i·z_m / τ)). :class:`~lightning_dp.AugmentationMultiplicity`
    with ``k=2`` makes the views and repeats each image's label, by which they are known, so labels must tell images apart.

    Args:
        network: ends in a linear layer, which is left out here and in what is saved.
        save_to: file for the weights of ``network`` when ``fit`` ends, which ``init_from`` takes with ``reset_classifier``;
            ``None`` saves nothing.
        width: length of z.
        temperature: τ.
        optimizer: makes the optimizer from all parameters.
        lr_scheduler: makes a scheduler from the optimizer, stepped after every optimizer step; ``None`` for a constant rate.

    Raises:
        ValueError: a number is out of range; in training, where an image comes with a single view.

    Source: T. Chen, S. Kornblith, M. Norouzi and G. Hinton 2020 (arXiv 2002.05709), for this loss; P. Khosla et al. 2020 (arXiv
    2004.11362), for more than two views.
    """

    def __init__(
        self,
        network: nn.Module,
        save_to: str | Path | None = None,
        width: int = 128,
        temperature: float = 0.2,
        optimizer: OptimizerCallable = adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width={width}: expected at least 1, such as 128.")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: expected a number above 0, such as 0.2.")
        name = classifier_name(network)
        parent, _, last = name.rpartition(".")
        features: int = network.get_submodule(name).in_features  # type: ignore[assignment]  # of an nn.Linear
        setattr(network.get_submodule(parent), last, nn.Identity())
        self.network = network
        self.projection = nn.Sequential(nn.Linear(features, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.save_to, self.temperature = save_to, temperature
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Map images to their features."""
        features: Tensor = self.network(images)
        return features

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch of views and the numbers of their images."""
        views, images = batch
        loss = contrastive_loss(self.projection(self(views)), images, self.temperature)
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and the scheduler if one was given."""
        optimizer = self.optimizer(list(self.parameters()))
        if self.lr_scheduler is None:
            return optimizer
        scheduler: torch.optim.lr_scheduler.LRScheduler = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def on_fit_end(self) -> None:
        """Save the weights of the network."""
        if self.save_to is not None and self.trainer.is_global_zero:
            Path(self.save_to).parent.mkdir(parents=True, exist_ok=True)
            torch.save({name: value.cpu() for name, value in self.network.state_dict().items()}, self.save_to)


def contrastive_loss(outputs: Tensor, images: Tensor, temperature: float) -> Tensor:
    """−log of the share that views of the same image have among all other views, averaged over pairs.

    Args:
        outputs: ``(n, width)``, one row for each view.
        images: ``(n,)``, which image it is of.
        temperature: τ.

    Raises:
        ValueError: there is an image with a single view.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
        >>> round(float(contrastive_loss(rows, torch.tensor([0, 0, 1, 1]), temperature=0.1)), 4)
        0.0001
    """
    z = F.normalize(outputs, dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    pairs = (images[:, None] == images[None, :]) & ~itself
    if not bool(pairs.any(1).all()):
        raise ValueError(
            "an image has one view: expected two or more, and labels that tell images apart. Add AugmentationMultiplicity(k=2)."
        )
    log_share = F.log_softmax((z @ z.T / temperature).masked_fill(itself, -torch.inf), dim=1)
    return -(log_share.masked_fill(~pairs, 0).sum(1) / pairs.sum(1)).mean()
