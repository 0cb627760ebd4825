"""A graph network on graphs that a library's loader has joined into one object."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy


class Graph:
    def __init__(self, nodes, edges, label):
        self.x, self.edge_index, self.y = nodes, edges, label


class Joined:
    """What torch_geometric's loader makes of a list of graphs, in small."""

    def __init__(self, graphs):
        self.graphs = graphs
        sizes = torch.tensor([len(graph.x) for graph in graphs])
        self.ptr = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])
        self.batch = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
        self.x = torch.cat([graph.x for graph in graphs])
        self.edge_index = torch.cat([g.edge_index + start for g, start in zip(graphs, self.ptr[:-1], strict=True)], 1)
        self.y = torch.tensor([graph.y for graph in graphs])

    def to_data_list(self):
        return self.graphs


class GraphClassifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 16), nn.Linear(16, 2)

    def training_step(self, batch, batch_idx):
        source, target = batch.edge_index
        hidden = self.first(batch.x)
        hidden = torch.relu(hidden + torch.zeros_like(hidden).index_add(0, target, hidden[source]))
        graphs = torch.zeros(len(batch.y), 16).index_add(0, batch.batch, hidden)
        return nn.functional.cross_entropy(self.head(graphs), batch.y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-3)


data = [Graph(torch.randn(3 + index % 4, 4), torch.randint(3, (2, 6)), index % 2) for index in range(32)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0)],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(GraphClassifier(), DataLoader(data, batch_size=8, collate_fn=Joined))
