"""Detection: images of different sizes and lists of boxes, in batches of torchvision's kind."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import resnet18
from torchvision.ops import FrozenBatchNorm2d, generalized_box_iou_loss

from lightning_dp import DifferentialPrivacy


class Detector(L.LightningModule):
    def __init__(self):
        super().__init__()
        backbone = resnet18(norm_layer=FrozenBatchNorm2d)
        self.features = nn.Sequential(*list(backbone.children())[:-2]).requires_grad_(False)
        self.head = nn.Conv2d(512, 5, 1)  # where a box is, and how sure

    def forward(self, image):
        cells = self.head(self.features(image[None])).flatten(2)[0].T
        corner, size = cells[:, :2].sigmoid(), cells[:, 2:4].exp()
        return torch.cat([corner, corner + size], dim=1), cells[:, 4]

    def loss(self, image, target):
        boxes, scores = self(image)
        overlaps = torch.stack([-generalized_box_iou_loss(boxes, box.expand_as(boxes)) for box in target["boxes"]])
        best, nearest = overlaps.max(1)
        hit = torch.zeros_like(scores).index_fill(0, nearest, 1.0)
        return nn.functional.binary_cross_entropy_with_logits(scores, hit) - best.mean()

    def training_step(self, batch, batch_idx):
        images, targets = batch
        return torch.stack([self.loss(image, target) for image, target in zip(images, targets, strict=True)]).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


def record(index):
    corners = torch.rand(1 + index % 3, 2)
    boxes = torch.cat([corners, corners + 0.5], dim=1)
    return torch.randn(3, 48 + 8 * (index % 2), 48), {"boxes": boxes}


data = [record(index) for index in range(8)]
trainer = L.Trainer(
    max_steps=2,
    callbacks=[DifferentialPrivacy(noise_multiplier=1.0, batch_axis={"0": "list", "1": "list"})],
    accelerator="cpu",
    logger=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    enable_checkpointing=False,
)
trainer.fit(Detector(), DataLoader(data, batch_size=4, collate_fn=lambda rows: tuple(zip(*rows, strict=True))))
