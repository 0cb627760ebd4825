"""Meta-learning: each example is an episode, adapted to on its support set and judged on its query set."""

import lightning as L
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Adapting(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))

    def loss(self, weights, images, labels):
        return nn.functional.cross_entropy(functional_call(self.net, weights, (images,)), labels)

    def training_step(self, batch, batch_idx):
        weights = dict(self.net.named_parameters())
        inner = self.loss(weights, *batch["support"])
        slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
        adapted = {name: weight - 0.1 * slope for (name, weight), slope in zip(weights.items(), slopes, strict=True)}
        return self.loss(adapted, *batch["query"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def examples(count):
    return torch.randn(count, 4), torch.randint(3, (count,))


data = [{"task": f"task {index}", "support": examples(6), "query": examples(9)} for index in range(24)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=4, batch_axis="each")],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Adapting(), DataLoader(data, batch_size=1, collate_fn=lambda episodes: episodes[0]))
