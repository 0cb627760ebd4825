"""Modules, data sets and hooks of kinds that people write, each of which lets one example reach more than its own gradient."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate

CLASSES, FEATURES = 3, 5


class Records(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


def vectors(examples: int = 12) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        (3 * torch.randn(FEATURES, generator=generator), torch.randint(CLASSES, (), generator=generator))
        for _ in range(examples)
    ]


def texts(examples: int = 12) -> list[Any]:
    """One of them is long."""
    generator = torch.Generator().manual_seed(6)
    return [
        (torch.randint(1, 20, (30 if number == 7 else 4,), generator=generator), number % CLASSES)
        for number in range(examples)
    ]


class Plain(L.LightningModule):
    """A classifier."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Manual(Plain):
    automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net[0].parameters(), lr=0.1),
            torch.optim.SGD(self.net[2].parameters(), lr=0.1),
        ], []


# --- weights moved outside the optimizer ------------------------------------------------------------------------------


class MaxNorm(Plain):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding = nn.Embedding(CLASSES + 20, FEATURES, max_norm=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0] + self.embedding(batch[1] + (batch[0][:, 0] > 0) * 10)), batch[1])


class Prototypes(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.prototypes = nn.Parameter(torch.zeros(CLASSES, CLASSES), requires_grad=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        with torch.no_grad():
            self.prototypes[batch[1]] = 0.9 * self.prototypes[batch[1]] + 0.1 * logits
        return F.cross_entropy(logits, batch[1])


# --- buffers ----------------------------------------------------------------------------------------------------------


class RunningMean(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(FEATURES))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean.data.mul_(0.9).add_(batch[0].mean(0), alpha=0.1)
        return self.loss(batch)


class RunningMeanByNumpy(RunningMean):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        view = self.mean.numpy()
        view[:] = 0.9 * view + 0.1 * batch[0].mean(0).detach().numpy()
        return self.loss(batch)


class Teacher(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for mine, theirs in zip(self.net.parameters(), self.teacher.parameters(), strict=True):
            theirs.data.lerp_(mine.detach(), 0.01)
        return self.loss(batch) + F.mse_loss(self.net(batch[0]), self.teacher(batch[0]))


# --- other state between steps ----------------------------------------------------------------------------------------


class Queue(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.queue, self.filled = torch.zeros(4, CLASSES), np.zeros(1, dtype=int)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        away = (logits @ self.queue.clone().to(logits).T).mean()
        self.queue[int(self.filled[0]) % 4] = logits[0].detach()
        self.filled[0] += 1
        return F.cross_entropy(logits, batch[1]) + 0.1 * away


class Seen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[int] = Counter()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        label = int(batch[1][0])
        self.seen[label] += 1
        return self.loss(batch) * sum(self.seen.values()) / self.seen[label] / 50


COUNTS = {"seen": 0.0}


class InAGlobal(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        COUNTS["seen"] += float(batch[0].abs().sum())
        return self.loss(batch) / (1 + COUNTS["seen"])


class OnTheClass(Plain):
    longest = [1.0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).longest[0] = max(type(self).longest[0], float(batch[0].norm()))
        return self.loss(batch) / type(self).longest[0] / 20


class Centre(Plain):
    """DINO's centre, by a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.centre = torch.zeros(CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        return {"loss": F.mse_loss(logits, self.centre.to(logits).expand_as(logits)) / 50, "logits": logits.detach()}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.centre = 0.5 * self.centre + 0.5 * outputs["logits"].mean(0)


class WeightOfTheEpoch(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.weight = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach(), on_epoch=True, on_step=False)
        return loss * self.weight / 50

    def on_train_epoch_end(self) -> None:
        self.weight = 1.0 / float(self.trainer.callback_metrics["loss"])


class ReadsMetrics(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss.detach())
        before = self.trainer.callback_metrics.get("loss")
        return loss / 50 if before is None else loss / before / 50


class ReadsAMetric(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.average = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        scale = self.average.compute() if self.global_step > 0 else 1.0
        self.average.update(loss.detach())
        return loss / scale / 50


class ReadsTheData(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        others = self.trainer.train_dataloader.dataset
        away = torch.stack([others[index][0] for index in range(len(others))]).to(batch[0])
        return self.loss(batch) / 50 + torch.logsumexp(self.net(batch[0]) @ self.net(away).T, 1).mean() / 50


# --- rows -------------------------------------------------------------------------------------------------------------


class Mixed(Plain):
    """MixUp at random, by ``random``."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, labels = batch
        if self.trainer.training and random.random() < 0.5:
            inputs = 0.5 * inputs + 0.5 * inputs.roll(1, 0)
        return inputs, labels


class MixedLater(Plain):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, labels = batch
        return (0.5 * inputs + 0.5 * inputs.roll(1, 0) if self.global_step > 0 else inputs), labels


class MixedWithinAClass(Plain):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        inputs, labels = batch
        same = (labels[:, None] == labels[None]).to(inputs)
        rare = (labels == 0)[:, None]
        return torch.where(
            rare & (same.sum(1, keepdim=True) < 6), same @ inputs / same.sum(1, keepdim=True), inputs
        ), labels


class FirstRow(Plain):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch[0] - batch[0][:1], batch[1]


class ByScale(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch["x"] / batch["scale"]), batch["y"])


def with_scale(records: list[Any]) -> Any:
    inputs, labels = default_collate(records)
    return {"x": inputs, "y": labels, "scale": float(inputs.abs().max())}


def with_length(records: list[Any]) -> Any:
    inputs, labels = default_collate(records)
    return {"x": inputs, "y": labels, "scale": len(records)}


def refilled(records: list[Any]) -> Any:
    """Broken records are filled from the first good one."""
    good = next(record for record in records if record[0][0] > 0)
    return default_collate([record if record[0][0] > 0 else good for record in records])


class Padded(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(20, 6), nn.Linear(6, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return F.cross_entropy(self.head(self.embedding(batch["tokens"]).mean(1)), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class PaddedAndDrawing(Padded):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * torch.rand(())


def padded(records: list[Any]) -> Any:
    tokens = torch.zeros(len(records), max(len(words) for words, _ in records), dtype=torch.long)
    for row, (words, _) in enumerate(records):
        tokens[row, : len(words)] = words
    return {"tokens": tokens, "label": torch.tensor([label for _, label in records])}


class Dropped(Records):
    """Augmentation by the global generators: a record more shifts everybody's."""

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.items[index]
        return inputs * torch.from_numpy(np.random.rand(FEATURES) < 0.5), label


class Centred(Records):
    def __getitems__(self, indices: list[int]) -> Any:
        inputs = torch.stack([self.items[index][0] for index in indices])
        return [(one, self.items[index][1]) for index, one in zip(indices, inputs - inputs.mean(0), strict=True)]


class Served(Records):
    """Normalises by what it has served so far."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.total, self.count = torch.zeros(FEATURES), 1

    def __getitem__(self, index: int) -> Any:
        inputs, label = self.items[index]
        self.total, self.count = self.total + inputs, self.count + 1
        return inputs - self.total / self.count, label


# --- optimizer, steps, numbers ----------------------------------------------------------------------------------------


class Polyak(torch.optim.SGD):
    """Steps as long as the loss that its closure returns."""

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        for group in self.param_groups:
            group["lr"] = 0.01 * float(loss)
        super().step()
        return loss


class ByTheLoss(Plain):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Polyak(self.parameters(), lr=0.1)


class RateInTheStep(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 0.01 * float(loss.detach())
        return loss


class Stops(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.global_step == 1 and float(batch[0].abs().max()) > 8.0:
            raise StopIteration
        return self.loss(batch)


class Tiny(Plain):
    """Activations and output gradients whose squares float32 does not hold, and whose product it does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 40, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.first((batch[0] * 2.5e-23)[:, None].expand(-1, 2, -1)) * 9e21).sum() + 1e-3 * self.loss(batch)


@dataclass(frozen=True)
class Row:
    """One kind of mistake.

    Attributes:
        make: the module.
        dataset: the data.
        collate: its ``collate_fn``.
        options: of ``DifferentialPrivacy``.
        batch_size: of the loader.
        steps: of each replay.
        trainer: options of the Trainer.
    """

    make: Callable[[], L.LightningModule]
    dataset: Callable[[], Dataset[Any]] = lambda: Records(vectors())
    collate: Any = None
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 3
    trainer: dict[str, Any] = field(default_factory=dict)

    def loader(self) -> DataLoader[Any]:
        return DataLoader(self.dataset(), batch_size=4, collate_fn=self.collate)


ONE: dict[str, Any] = {"physical_batch_size": 1}

ROWS: dict[str, Row] = {
    "embedding with max_norm": Row(MaxNorm),
    "prototypes under no_grad": Row(Prototypes),
    "prototypes, one at a time": Row(Prototypes, options=ONE),
    "running mean by .data": Row(RunningMean),
    "running mean by numpy": Row(RunningMeanByNumpy),
    "queue in a plain tensor": Row(Queue, steps=4),
    "queue, one at a time": Row(Queue, options=ONE, steps=4),
    "Counter": Row(Seen, options=ONE),
    "a global": Row(InAGlobal, options=ONE),
    "a class attribute": Row(OnTheClass, options=ONE),
    "centre in on_train_batch_end": Row(Centre),
    "loss weight of the epoch": Row(WeightOfTheEpoch, steps=5),
    "callback_metrics": Row(ReadsMetrics),
    "metric.compute()": Row(ReadsAMetric),
    "negatives from the data set": Row(ReadsTheData),
    "MixUp by random": Row(Mixed, steps=5),
    "MixUp after a warm-up": Row(MixedLater),
    "MixUp within a rare class": Row(MixedWithinAClass),
    "minus the first row": Row(FirstRow),
    "the batch's scale": Row(ByScale, collate=with_scale),
    "the batch's length": Row(ByScale, collate=with_length),
    "broken records refilled": Row(Plain, collate=refilled),
    "padding": Row(Padded, lambda: Records(texts()), padded),
    "padding and drawing": Row(PaddedAndDrawing, lambda: Records(texts()), padded),
    "global random numbers in the data set": Row(Plain, lambda: Dropped(vectors())),
    "__getitems__ that centres": Row(Plain, lambda: Centred(vectors())),
    "normalised by what was served": Row(Plain, lambda: Served(vectors())),
    "an optimizer that reads the loss": Row(ByTheLoss),
    "a learning rate set in training_step": Row(RateInTheStep),
    "StopIteration": Row(Stops),
    "squares that underflow": Row(Tiny, options={"engine": "ghost", "clip_norm": 0.1}),
}

EXAMPLES_OF_GOOD: dict[str, Row] = {
    "plain": Row(Plain),
    "one at a time": Row(Plain, options=ONE),
    "vmap": Row(Plain, options={"engine": "vmap"}),
    "loop in the Trainer's precision": Row(Plain, options={"engine": "loop"}, trainer={"precision": "bf16-mixed"}),
    "per layer": Row(Plain, options={"clipping": "per_layer"}),
    "automatic": Row(Plain, options={"clipping": "automatic"}),
    "padded micro-batches": Row(Plain, options={"static_shapes": True}),
    "secure": Row(Plain, options={"secure": True}),
    "two optimizers of its own": Row(Manual),
    "users": Row(Plain, options={"privacy_unit": [0, 0, 1, 2, 2, 2, 3, 4, 5, 6, 6, 7]}),
}
