"""A vision transformer of transformers on batches that are dicts."""

import lightning as L
import torch
import transformers
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        config = transformers.ViTConfig(
            image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
        )
        self.vit = transformers.ViTForImageClassification(config)

    def training_step(self, batch, batch_idx):
        return self.vit(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


data = [{"pixel_values": torch.randn(3, 8, 8), "labels": number % 2} for number in range(32)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Classifier(), DataLoader(data, batch_size=8))
