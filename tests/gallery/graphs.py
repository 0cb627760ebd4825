"""A graph network, which joins the graphs of a batch into one."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class GraphClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def pass_messages(self, nodes, edges):
        return torch.relu(nodes + torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]]))

    def training_step(self, batch, batch_idx):
        sizes = torch.tensor([len(nodes) for nodes, _, _ in batch])
        starts = sizes.cumsum(0) - sizes
        nodes = torch.cat([nodes for nodes, _, _ in batch])
        edges = torch.cat([edges + start for (_, edges, _), start in zip(batch, starts, strict=True)], dim=1)
        graph_of = torch.repeat_interleave(torch.arange(len(batch)), sizes)

        hidden = self.pass_messages(self.first(nodes), edges)
        hidden = self.pass_messages(self.second(hidden), edges)
        graphs = torch.zeros(len(batch), 16).index_add(0, graph_of, hidden)
        return nn.functional.cross_entropy(self.head(graphs), torch.tensor([label for _, _, label in batch]))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = [(torch.randn(3 + index % 4, 4), torch.randint(3, (2, 6)), index % 2) for index in range(32)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0, batch_axis="list")],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(GraphClassifier(), DataLoader(data, batch_size=8, collate_fn=list))
