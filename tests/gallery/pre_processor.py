"""A callback that transforms the batch at its start, as an anomaly-detection library does."""

from dataclasses import dataclass

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


@dataclass
class Batch:
    image: torch.Tensor
    mask: torch.Tensor


class PreProcessor(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.image, batch.mask = 2 * batch.image - 1, batch.mask.float()


class Reconstruction(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16))

    def training_step(self, batch, batch_idx):
        images = batch.image.flatten(1)
        return ((self.net(images) - images).square() * (1 - batch.mask.flatten(1))).mean()

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.log("height", float(batch.image.shape[-1]), batch_size=1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def collate(rows):
    return Batch(torch.stack([image for image, _ in rows]), torch.stack([mask for _, mask in rows]))


data = [(torch.rand(1, 4, 4), torch.rand(1, 4, 4) > 0.9) for _ in range(32)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[
        PreProcessor(),
        DifferentialPrivacy(noise_multiplier=1.0),
    ],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Reconstruction(), DataLoader(data, batch_size=8, collate_fn=collate))
