"""A loss that normalises over the batch is told from one that keeps examples apart, and its kind is named."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from torchvision.ops import sigmoid_focal_loss

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, trainer

PIXELS = 6
INPUTS = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(0, 3, (32, PIXELS), generator=torch.Generator().manual_seed(1))
LABELS[
    torch.arange(PIXELS) >= 1 + torch.arange(32)[:, None] % 5
] = -1  # no label: one to five pixels of an image have one
DATA = TensorDataset(INPUTS, LABELS)
Loss = Callable[[Tensor, Tensor], Tensor]


class Segmenter(Regressor):
    """Three classes for each of six pixels."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 3 * PIXELS))
        self.loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(self.body(batch[0]).reshape(-1, 3, PIXELS), batch[1])


def one_hot(y: Tensor) -> Tensor:
    return F.one_hot(y.clamp_min(0), 3).movedim(-1, 1).double()


def parts(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Focal terms (Lin et al. 2017) and cross entropies of all pixels."""
    entropy = F.cross_entropy(z, y.clamp_min(0), reduction="none")
    return (1 - torch.exp(-entropy)) ** 2, entropy


def torchvision_focal(reduction: str) -> Loss:
    def loss(z: Tensor, y: Tensor) -> Tensor:
        found = sigmoid_focal_loss(z, one_hot(y).to(z), reduction=reduction)
        return found.mean() if reduction == "none" else found

    return loss


def focal_over_valid_pixels(z: Tensor, y: Tensor) -> Tensor:
    focal, entropy = parts(z, y)
    valid = y >= 0
    return (focal * entropy * valid).sum() / valid.sum()


def focal_of_each_image_normalised(z: Tensor, y: Tensor) -> Tensor:
    focal, entropy = parts(z, y)
    return ((focal * entropy).sum(1) / focal.sum(1)).mean()


def weighted_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, weight=torch.tensor([1.0, 3.0, 0.5]).to(z), ignore_index=-1)


def by_positives(z: Tensor, y: Tensor) -> Tensor:
    """As RetinaNet's: divided by the number of positives, which all of these examples have."""
    return sigmoid_focal_loss(z, one_hot(y).to(z), reduction="sum") / (y == 1).sum().clamp_min(1)


def dice_of_each_image(z: Tensor, y: Tensor) -> Tensor:
    p, t = z.softmax(1), one_hot(y).to(z)
    return (1 - 2 * (p * t).sum((1, 2)) / (p + t).sum((1, 2))).mean()


def dice_of_classes(z: Tensor, y: Tensor) -> Tensor:
    """Over the batch, yet its denominator is twice the number of pixels."""
    p, t = z.softmax(1), one_hot(y).to(z)
    return 1 - 2 * (p * t).sum() / (p + t).sum()


APART = {
    "torchvision's focal loss, none": (torchvision_focal("none"), None),
    "torchvision's focal loss, mean": (torchvision_focal("mean"), None),
    "torchvision's focal loss, sum": (torchvision_focal("sum"), None),
    "over valid pixels": (focal_over_valid_pixels, "neither the mean nor the sum"),
    "normalised in each image": (focal_of_each_image_normalised, None),
    "class weights": (weighted_cross_entropy, "neither the mean nor the sum"),
    "by the number of positives": (by_positives, "neither the mean nor the sum"),
    "dice of classes that add up to one": (dice_of_classes, None),
    "dice of each image": (dice_of_each_image, None),
}


@pytest.mark.parametrize("name", APART)
def test_what_keeps_examples_apart_trains(name: str) -> None:
    loss, text = APART[name]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(Segmenter(loss), loader(DATA, 8))
    assert any(text is not None and text in str(one.message) for one in told) == (text is not None)


def normalised_focal(z: Tensor, y: Tensor) -> Tensor:
    """As kornia's and segmentation_models.pytorch's with normalized=True: the norm moves with the weights."""
    focal, entropy = parts(z, y)
    return (focal * entropy / focal.sum().clamp_min(1e-6)).sum()


def normalised_focal_mean(z: Tensor, y: Tensor) -> Tensor:
    focal, entropy = parts(z, y)
    return (focal * entropy / focal.sum().clamp_min(1e-6)).mean()


def dice_over_the_batch(z: Tensor, y: Tensor) -> Tensor:
    p, t = z[:, 1].sigmoid(), (y == 1).to(z)
    return 1 - 2 * (p * t).sum() / (p + t).sum()


def jaccard_over_the_batch(z: Tensor, y: Tensor) -> Tensor:
    p, t = z[:, 1].sigmoid(), (y == 1).to(z)
    return 1 - (p * t).sum() / (p + t - p * t).sum()


def by_a_root(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y, ignore_index=-1, reduction="sum") / (y >= 0).sum().to(z).sqrt()


def weight_of_the_batch(z: Tensor, y: Tensor) -> Tensor:
    """A factor by how often the network is right in the batch."""
    return F.cross_entropy(z, y, ignore_index=-1) * (2.0 - (z.argmax(1) == y).to(z).mean())


def nearest_in_the_batch(z: Tensor, y: Tensor) -> Tensor:
    v = F.normalize(z.flatten(1), dim=1)
    return F.cross_entropy(v @ v.roll(1, 1).T / 0.1, torch.arange(len(z)))


def triplets(z: Tensor, y: Tensor) -> Tensor:
    v = z.flatten(1)
    return torch.cdist(v, v).clamp_min(1e-3).pow(0.5).mean() if len(v) > 1 else v.sum() * 0


def mixed_up(z: Tensor, y: Tensor) -> Tensor:
    order = torch.randperm(len(z))
    return F.cross_entropy(0.7 * z + 0.3 * z[order], y.clamp_min(0))


def whitened(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z - 0.5 * z.mean(0), y, ignore_index=-1)


def hardest(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z, y.clamp_min(0), reduction="none").flatten().topk(5).values.mean()


def class_weights_of_the_batch(z: Tensor, y: Tensor) -> Tensor:
    counts = torch.bincount(y[y >= 0], minlength=3).to(z)
    return F.cross_entropy(z, y, weight=1 / (1 + counts), ignore_index=-1, reduction="sum")


COUPLED = {
    "a normalised focal loss": (normalised_focal, "divided by another sum over the batch that moves", "normalized=False"),
    "its mean": (normalised_focal_mean, "divided by another sum over the batch that moves", "normalized=False"),
    "dice over the batch": (dice_over_the_batch, "Dice or Jaccard loss over the batch", "each example's own pixels"),
    "jaccard over the batch": (jaccard_over_the_batch, "Dice or Jaccard loss over the batch", "each example's own pixels"),
    "by a root": (by_a_root, "a number made of the whole batch", "Divide by a constant"),
    "a weight of the batch": (weight_of_the_batch, "a weight of the batch", "Divide by a constant"),
    "negatives of the batch": (nearest_in_the_batch, "compares its examples with each other", "own pair or negatives"),
    "distances in the batch": (triplets, "compares its examples with each other", "own pair or negatives"),
    "mixing": (mixed_up, "draws at random which examples enter each other's", "Mix within a record"),
    "a mean of the batch": (whitened, "statistics of the batch", "public numbers"),
    "the hardest pixels": (hardest, "statistics of the batch", "public numbers"),
    "class weights of the batch": (class_weights_of_the_batch, "weights by the classes in it", "public numbers"),
}  # fmt: skip


@pytest.mark.parametrize("name", COUPLED)
def test_what_couples_them_is_refused_by_its_kind(name: str) -> None:
    loss, kind, remedy = COUPLED[name]
    private = DifferentialPrivacy(noise_multiplier=1.0)
    with pytest.raises(PreflightError, match="training_step couples examples: the loss of a batch ") as caught:
        trainer(private, max_steps=1).fit(Segmenter(loss), loader(DATA, 8))
    assert kind in str(caught.value)
    assert remedy in str(caught.value)
    assert private.ledger is None or private.ledger.steps == 0
