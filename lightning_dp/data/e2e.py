"""Restaurants described in words: the E2E data set from its CSV files, or made-up records of the same form."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset
from typing_extensions import override

from lightning_dp.data.images import DataError
from lightning_dp.data.made_up_restaurants import Style, made_up_restaurants
from lightning_dp.data.sets import SetsDataModule
from lightning_dp.data.tokenizers import end_of, load_tokenizer

IGNORED = -100
"""The label of a position whose word is not to be predicted, as in ``torch.nn.functional.cross_entropy``."""

COLUMNS = ("mr", "ref")

_SEEDS = {"train": 1, "val": 2, "test": 3}


class E2EDataModule(SetsDataModule):
    """Pairs of a meaning and a text, for a language model that is to write the text.

    An item is ``(words, labels)``, int64, ``(max_length,)`` each: meaning, line break, text, and the mark of an end as often as
    there is room. Labels are :data:`IGNORED` on the meaning and after the first mark. What is longer is cut off at the end. One
    record is one row: in E2E a meaning has several, and a person who wrote several texts is protected in each alone.

    ``test_dataloader`` gives each meaning once: ``(words, mask, texts)``, the words filled up on the left, and all the
    texts that people wrote for it.

    Args:
        root: a folder with ``trainset.csv``, ``devset.csv`` and ``testset_w_refs.csv`` of the E2E data set, columns ``mr`` and
            ``ref``. ``None`` for made-up records.
        tokenizer: see :func:`lightning_dp.data.tokenizers.load_tokenizer`; public.
        batch_size: examples in a training batch.
        val_batch_size: examples in a batch of the other loaders.
        max_length: of meaning and text together, in words of the vocabulary.
        made_up: how many made-up records to train on; a tenth of it to validate and to test on.
        style: of the made-up records, see :func:`~lightning_dp.data.made_up_restaurants.made_up_restaurants`.

    Raises:
        ValueError: a number is below 1.
        DataError: in ``setup``: a file is missing or has other columns; the vocabulary has no mark of an end.

    Example:
        >>> data = E2EDataModule(made_up=100, max_length=16)
        >>> data.setup()
        >>> words, labels = data.train_set[0]
        >>> len(data.train_set), tuple(words.shape)
        (100, (16,))

    Source: J. Novikova, O. Dušek, V. Rieser, *The E2E Dataset: New Challenges For End-to-End Generation*, SIGDIAL 2017.
    """

    def __init__(
        self,
        root: str | None = None,
        tokenizer: str = "made-up",
        batch_size: int = 256,
        val_batch_size: int = 100,
        max_length: int = 128,
        made_up: int = 8000,
        style: Style = "local",
    ) -> None:
        super().__init__(batch_size, val_batch_size, max_length=max_length, made_up=made_up)
        self.root, self.tokenizer_source = root, tokenizer
        self.max_length, self.made_up, self.style = max_length, made_up, style
        self.tokenizer: Any = None

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read or make the records; ``stage`` makes no difference."""
        self.tokenizer = load_tokenizer(self.tokenizer_source)
        self.end = end_of(self.tokenizer)
        self.train_set = self._tensors(self.records("train"))
        self.val_set = self._tensors(self.records("val"))
        self.test_set = Meanings(self.records("test"))

    def records(self, split: str) -> list[tuple[str, str]]:
        """The pairs of ``"train"``, ``"val"`` or ``"test"``."""
        if self.root is None:
            count = self.made_up if split == "train" else max(self.made_up // 10, 1)
            return made_up_restaurants(count, _SEEDS[split], self.style)
        files = {"train": "trainset.csv", "val": "devset.csv", "test": "testset_w_refs.csv"}
        return read_pairs(Path(self.root) / files[split])

    def decode(self, words: Tensor) -> str:
        """The text of some words up to the first mark of an end."""
        ends = (words == self.end).nonzero()
        text: str = self.tokenizer.decode(words[: int(ends[0])].tolist() if len(ends) else words.tolist())
        return text.strip()

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the meanings to write texts for, each with its texts."""
        return DataLoader(self.test_set, batch_size=self.val_batch_size, collate_fn=self._prompts)

    def _tensors(self, pairs: Sequence[tuple[str, str]]) -> TensorDataset:
        words = torch.full((len(pairs), self.max_length), self.end)
        labels = torch.full((len(pairs), self.max_length), IGNORED)
        meanings = self.tokenizer.encode_batch([_prompt(meaning) for meaning, _ in pairs], add_special_tokens=False)
        texts = self.tokenizer.encode_batch([text for _, text in pairs], add_special_tokens=False)
        for row, (meaning, text) in enumerate(zip(meanings, texts, strict=True)):
            whole = torch.tensor([*meaning.ids, *text.ids, self.end])[: self.max_length]
            words[row, : len(whole)] = whole
            labels[row, len(meaning.ids) : len(whole)] = whole[len(meaning.ids) :]
        return TensorDataset(words, labels)

    def _prompts(self, items: list[tuple[str, list[str]]]) -> tuple[Tensor, Tensor, list[list[str]]]:
        found = [
            one.ids[-self.max_length :]
            for one in self.tokenizer.encode_batch([_prompt(meaning) for meaning, _ in items], add_special_tokens=False)
        ]
        longest = max(map(len, found))
        words = torch.tensor([[self.end] * (longest - len(ids)) + ids for ids in found])
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in found])
        return words, mask, [texts for _, texts in items]


class Meanings(Dataset[tuple[str, list[str]]]):
    """Each meaning once, with all its texts; those in succession belong together, as in the E2E data set's file.

    Args:
        pairs: of a meaning and a text.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        starts = [i for i in range(len(pairs)) if i == 0 or pairs[i][0] != pairs[i - 1][0]]
        self.items = [(pairs[a][0], [text for _, text in pairs[a:b]]) for a, b in pairwise([*starts, len(pairs)])]

    def __len__(self) -> int:
        return len(self.items)

    @override
    def __getitem__(self, index: int) -> tuple[str, list[str]]:
        return self.items[index]


def read_pairs(path: Path, columns: tuple[str, str] = COLUMNS) -> list[tuple[str, str]]:
    """Read two columns of a CSV file, in the order of its rows.

    Args:
        path: of the file, with a header, in UTF-8.
        columns: names of the two.

    Raises:
        DataError: there is no such file, or it lacks a column, or it has no rows.
    """
    if not path.is_file():
        raise DataError(f"root: found no {path}: expected the file there. Give the folder in which the CSV files are.")
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise DataError(
                f"{path} lacks the columns {', '.join(missing)}: expected a header with {' and '.join(columns)}. It has "
                f"{', '.join(reader.fieldnames or ()) or 'none'}."
            )
        pairs = [(row[columns[0]] or "", row[columns[1]] or "") for row in reader]
    if not pairs:
        raise DataError(f"{path} has a header and no rows: expected at least one. Give a file with records.")
    return pairs


def _prompt(meaning: str) -> str:
    return f"{meaning}\n"
