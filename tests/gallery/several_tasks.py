"""Two tasks, returned as a dict with the key loss."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.kind, self.size = nn.Linear(8, 16), nn.Linear(16, 3), nn.Linear(16, 1)

    def training_step(self, batch, batch_idx):
        hidden = torch.tanh(self.body(batch["inputs"]))
        kind = nn.functional.cross_entropy(self.kind(hidden), batch["kind"])
        size = nn.functional.mse_loss(self.size(hidden)[:, 0], batch["size"])
        self.log_dict({"train/kind": kind, "train/size": size})
        return {"loss": kind + 0.5 * size, "size_error": size.detach()}

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = [
    {"inputs": torch.randn(8), "kind": number % 3, "size": torch.tensor(number / 32), "name": f"record {number}"}
    for number in range(32)
]
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
