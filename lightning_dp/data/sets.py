"""What all data modules share: the sets that ``setup`` makes, each with its loader."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override


class SetsDataModule(L.LightningDataModule):
    """Base of the data modules: ``setup`` makes ``train_set``, ``val_set`` and, where there is a third, ``test_set``.

    Args:
        batch_size: examples in a training batch: under differential privacy the expected batch size, over all ranks
            together if ``DifferentialPrivacy(expected_batch_size=...)`` says so.
        val_batch_size: examples in a batch of the other loaders.
        more: other numbers that must be at least 1, by name.

    Raises:
        ValueError: a number is below 1.
    """

    train_set: Dataset[Any]
    val_set: Dataset[Any]
    test_set: Dataset[Any]

    def __init__(self, batch_size: int, val_batch_size: int, **more: int) -> None:
        super().__init__()
        for name, value in {"batch_size": batch_size, "val_batch_size": val_batch_size, **more}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1. Give a number such as 100.")
        self.batch_size, self.val_batch_size = batch_size, val_batch_size

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training examples, shuffled."""
        return self.loader(self.train_set, self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation examples, in order."""
        return self.loader(self.val_set, self.val_batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test examples, in order; those to validate on where there is no third set."""
        return self.loader(getattr(self, "test_set", self.val_set), self.val_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return what ``test_dataloader`` does."""
        return self.test_dataloader()

    def loader(self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        """The loader of one of the sets."""
        return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle)
