"""A mean over padded sequences, the padding included."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 3)

    def training_step(self, batch, batch_idx):
        sequences, targets = batch
        return nn.functional.cross_entropy(self.net(sequences).mean(1), targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = [(torch.randn(3 + number % 4, 4), number % 3) for number in range(32)]


def padded(records):
    sequences = nn.utils.rnn.pad_sequence([record[0] for record in records], batch_first=True)
    return sequences, torch.tensor([record[1] for record in records])


trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Model(), DataLoader(data, batch_size=8, collate_fn=padded))
