"""An EfficientNet of timm, whose BatchNorm layers with an activation inside have been replaced."""

import lightning as L
import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.layers.replacements import make_trainable_privately


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = make_trainable_privately(timm.create_model("test_efficientnet", num_classes=3))

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return nn.functional.cross_entropy(self.net(images), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = TensorDataset(torch.randn(8, 3, 32, 32), torch.randint(3, (8,)))
trainer = L.Trainer(
    max_steps=1,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), DataLoader(data, batch_size=4))
