"""A variational autoencoder that draws with torch.distributions."""

import lightning as L
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class Autoencoder(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))

    def training_step(self, batch, batch_idx):
        images = batch[0].flatten(1)
        mean, log_scale = self.encoder(images).chunk(2, dim=1)
        posterior = Normal(mean, log_scale.exp())
        again = self.decoder(posterior.rsample())
        reconstruction = (again - images).square().sum(1)
        return (reconstruction + kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)).mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = TensorDataset(torch.rand(32, 8, 8))
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Autoencoder(), DataLoader(data, batch_size=8))
