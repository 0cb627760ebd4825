"""Speech with a CTC loss, the lengths of input and target in the batch."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 6)

    def training_step(self, batch, batch_idx):
        sounds, targets, sound_lengths, target_lengths = batch
        scores = self.net(sounds).log_softmax(-1).transpose(0, 1)  # CTC wants the time first
        return nn.functional.ctc_loss(scores, targets, sound_lengths, target_lengths)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


lengths = torch.randint(6, 9, (32,)), torch.randint(1, 4, (32,))
data = TensorDataset(torch.randn(32, 8, 5), torch.randint(1, 6, (32, 3)), *lengths)
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
