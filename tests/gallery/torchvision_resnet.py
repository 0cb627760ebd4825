"""A ResNet-18 of torchvision, its BatchNorm replaced by GroupNorm and its weights standardised."""

import lightning as L
import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.layers.replacements import make_trainable_privately


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        network = torchvision.models.resnet18(num_classes=3)
        self.net = make_trainable_privately(network, weight_standardisation=True)

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return nn.functional.cross_entropy(self.net(images), targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


data = TensorDataset(torch.randn(4, 3, 32, 32), torch.randint(3, (4,)))
trainer = L.Trainer(
    max_steps=1,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), DataLoader(data, batch_size=2))
