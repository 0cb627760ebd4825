"""Sentences of different lengths, padded and masked as a tokenizer would."""

from __future__ import annotations

from typing import Any

import torch
from transformers import BatchEncoding

VOCABULARY = 60
SENTENCES = [
    {"ids": torch.randint(5, VOCABULARY, (4 + number % 4,), generator=torch.Generator().manual_seed(number)),
     "label": number % 2}
    for number in range(32)
]  # fmt: skip


def padded(sentences: list[dict[str, Any]]) -> BatchEncoding:
    """A batch as long as its longest sentence."""
    ids = torch.nn.utils.rnn.pad_sequence([sentence["ids"] for sentence in sentences], batch_first=True)
    labels = torch.tensor([sentence["label"] for sentence in sentences])
    return BatchEncoding({"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels})


def padded_for_the_next_word(sentences: list[dict[str, Any]]) -> BatchEncoding:
    """The same, where every word is to be predicted and padding is not."""
    batch = padded(sentences)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch
