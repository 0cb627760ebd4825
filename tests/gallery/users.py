"""Messages of people who wrote several each, with the person protected and not the message."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.words, self.kind = nn.EmbeddingBag(50, 16), nn.Linear(16, 3)

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.kind(self.words(batch["words"])), batch["kind"])
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


messages = [
    {"words": torch.randint(50, (12,)), "kind": number % 3, "user_id": f"person {number * number % 17}"}
    for number in range(64)
]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0, privacy_unit="user_id", max_examples_per_unit=4)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Model(), DataLoader(messages, batch_size=4))
