"""A loss, a weight and a schedule that are set in hooks."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))

    def on_fit_start(self):
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)

    def on_train_epoch_start(self):
        self.weight = 1.0 / (1 + self.current_epoch)

    def on_train_batch_start(self, batch, batch_idx):
        self.sharpness = 1.0 + 0.1 * batch_idx

    def training_step(self, batch, batch_idx):
        inputs, classes = batch
        return self.weight * self.criterion(self.sharpness * self.net(inputs), classes)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = TensorDataset(torch.randn(32, 8), torch.randint(0, 4, (32,)))
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Model(), DataLoader(data, batch_size=8))
