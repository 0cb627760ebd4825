"""A loss that is a metric of torchmetrics, with a state of its own."""

import lightning as L
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class Quantile(torchmetrics.Metric):
    """The pinball loss, summed in a state as a forecasting library's losses are."""

    full_state_update = False

    def __init__(self, quantile):
        super().__init__()
        self.quantile = quantile
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predicted, targets):
        off = targets - predicted
        self.total += torch.maximum(self.quantile * off, (self.quantile - 1) * off).sum()
        self.count += off.numel()

    def compute(self):
        return self.total / self.count


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))
        self.loss = torchmetrics.MetricCollection({"low": Quantile(0.1), "high": Quantile(0.9)})

    def training_step(self, batch, batch_idx):
        past, future = batch
        losses = self.loss(self.net(past), future)
        self.log_dict(losses)
        return losses["low"] + losses["high"]

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = TensorDataset(torch.randn(32, 12), torch.randn(32, 3))
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
