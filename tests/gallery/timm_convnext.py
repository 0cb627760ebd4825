"""A ConvNeXt of timm."""

import lightning as L
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = timm.create_model("test_convnext", num_classes=3)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        loss = nn.functional.cross_entropy(self.net(images), targets)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


data = TensorDataset(torch.randn(16, 3, 32, 32), torch.randint(3, (16,)))
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), DataLoader(data, batch_size=4))
