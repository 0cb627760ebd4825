"""Modules under manual optimization, as people write them; nothing in them knows about privacy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from tests.conftest import Regressor


class ManualRegressor(Regressor):
    """The regressor of the other tests, with a training loop of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer = self.optimizers()
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.log("train/loss", loss)


class Gan(L.LightningModule):
    """Lightning's example of a GAN in small: generator first, toggles, zero_grad after the step, losses logged last."""

    every = 1

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
        self.lr = lr

    def adversarial_loss(self, images: Tensor, real: float) -> Tensor:
        scores = self.discriminator(images)
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, _ = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(images.shape[0], 3).type_as(images)
        g_loss = None
        if batch_idx % self.every == 0:
            self.toggle_optimizer(optimizer_g)
            g_loss = self.adversarial_loss(self.generator(z), 1.0)
            self.manual_backward(g_loss)
            optimizer_g.step()
            optimizer_g.zero_grad()
            self.untoggle_optimizer(optimizer_g)
        self.toggle_optimizer(optimizer_d)
        real = self.adversarial_loss(images, 1.0)
        fake = self.adversarial_loss(self.generator(z).detach(), 0.0)
        d_loss = (real + fake) / 2
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)
        self.log_dict({"d_loss": d_loss, **({} if g_loss is None else {"g_loss": g_loss})})

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), lr=self.lr),
            torch.optim.SGD(self.discriminator.parameters(), lr=self.lr),
        ]


def gan(**options: Any) -> Gan:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Gan(**options)


def manual_regressor(**options: Any) -> ManualRegressor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ManualRegressor(**options)
