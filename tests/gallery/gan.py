"""A generative adversarial network, optimized by hand: the discriminator sees private images, the generator never does."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class GAN(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh())
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def adversarial_loss(self, images, real):
        scores = self.discriminator(images.flatten(1))
        return nn.functional.binary_cross_entropy_with_logits(scores, torch.full_like(scores, real))

    def training_step(self, batch, batch_idx):
        (images,) = batch
        generator, discriminator = self.optimizers()
        z = torch.randn(len(images), 8, device=self.device)

        self.toggle_optimizer(generator)
        g_loss = self.adversarial_loss(self.generator(z), 1.0)
        self.manual_backward(g_loss)
        generator.step()
        generator.zero_grad()
        self.untoggle_optimizer(generator)

        self.toggle_optimizer(discriminator)
        fakes = self.generator(z).detach()
        d_loss = (self.adversarial_loss(images, 1.0) + self.adversarial_loss(fakes, 0.0)) / 2
        self.manual_backward(d_loss)
        discriminator.step()
        discriminator.zero_grad()
        self.untoggle_optimizer(discriminator)
        self.log_dict({"g_loss": g_loss, "d_loss": d_loss})

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), lr=2e-4) for part in (self.generator, self.discriminator)]


data = TensorDataset(torch.rand(32, 1, 8, 8))
trainer = L.Trainer(
    max_steps=4,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0, public_optimizers=[0])],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(GAN(), DataLoader(data, batch_size=8))
