"""A language model that learns to write what follows a beginning, to train with or without privacy."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.text import BLEUScore
from typing_extensions import override

from lightning_dp.models.adapters import adapt
from lightning_dp.models.gpt2 import GPT2


def adamw(parameters: object, lr: float = 1e-3) -> torch.optim.AdamW:
    """AdamW without weight decay."""
    return torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)  # type: ignore[arg-type]  # what module.parameters() gives


class LanguageModel(L.LightningModule):
    """Cross-entropy of the words to be written, the mean over those of a text. Nothing in it knows about privacy.

    A text's loss is the mean over its own words, and the loss of a batch is the mean of its texts, so that each text counts
    alike however long it is.

    Logged: ``train/loss`` at every step, ``val/loss``, ``val/perplexity`` (of all words together), and under ``test``
    ``test/bleu``: BLEU-4 of what is written greedily against all texts of the same meaning, lower case, punctuation apart. It
    is not the official script of the E2E challenge, which splits words in another way.

    Args:
        network: the network.
        train: ``"all"`` parameters, ``"lora"``, ``"bitfit"``, or patterns of names, see
            :func:`lightning_dp.models.adapters.adapt`.
        rank: r of LoRA.
        alpha: α of LoRA.
        targets: the layers that get adapters, by the ends of their names, separated by commas.
        optimizer: makes the optimizer from the parameters to train; in YAML a ``class_path`` with ``init_args``.
        lr_scheduler: makes a scheduler from the optimizer, stepped after every optimizer step.
        longest: words to write at most, under ``test``.

    Raises:
        ValueError: a name matches nothing, or a number is out of range.

    Example:
        >>> network = GPT2(vocabulary=50, width=8, depth=1, heads=2, positions=16)
        >>> model = LanguageModel(network, train="lora", rank=2)
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
        64
    """

    def __init__(
        self,
        network: GPT2,
        train: str = "all",
        rank: int = 4,
        alpha: float = 32.0,
        targets: str = "c_attn",
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
        longest: int = 64,
    ) -> None:
        super().__init__()
        self.network, self.optimizer, self.lr_scheduler, self.longest = network, optimizer, lr_scheduler, longest
        adapt(network, train, targets=[target.strip() for target in targets.split(",")], rank=rank, alpha=alpha)
        if network.chunk and network.gpt.lm_head.weight.requires_grad:
            raise ValueError(
                f"chunk={network.chunk} with train={train!r}: expected a frozen embedding, which is the output layer too. Use "
                "train='lora' or 'bitfit', or chunk=0."
            )
        self.val_words = MeanMetric()
        self.bleu = BLEUScore()

    @override
    def forward(self, words: Tensor) -> Tensor:
        """Map texts to logits of each next word."""
        logits: Tensor = self.network(words)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean over the texts of the mean over a text's words."""
        words, labels = batch
        loss = _per_text(self.network.losses(words, labels), labels).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        words, labels = batch
        losses = self.network.losses(words, labels)
        self.val_words.update(losses, (labels[:, 1:] >= 0).to(losses.dtype))
        self.log("val/loss", _per_text(losses, labels).mean(), prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        """Log ``val/perplexity``."""
        self.log("val/perplexity", self.val_words.compute().exp())
        self.val_words.reset()

    @override
    def test_step(self, batch: tuple[Tensor, Tensor, list[list[str]]], batch_idx: int) -> None:
        """Write a text for each meaning, and log ``test/bleu``."""
        words, mask, texts = batch
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning's own, and untyped
        written = [data.decode(one) for one in self.network.write(words, mask, self.longest, data.end).cpu()]
        self.bleu.update([apart(one) for one in written], [[apart(one) for one in of_one] for of_one in texts])
        self.log("test/bleu", self.bleu)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer of the trained parameters, and the scheduler if one was given."""
        optimizer = self.optimizer([p for p in self.network.parameters() if p.requires_grad])
        if self.lr_scheduler is None:
            return optimizer
        scheduler: Any = self.lr_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def apart(text: str) -> str:
    """Lower case, and a space around each mark, as BLEU splits at spaces.

    Example:
        >>> apart("It's open, see?")
        "it ' s open , see ?"
    """
    return " ".join("".join(c if c.isalnum() or c.isspace() else f" {c} " for c in text.lower()).split())


def _per_text(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean of each row over the words that count."""
    counts = (labels[:, 1:] >= 0).sum(1)
    return losses.sum(1) / counts.clamp(min=1)
