"""scikit-learn's handwritten digits, as a data module."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset
from typing_extensions import override

from lightning_dp.data.sets import SetsDataModule
from lightning_dp.models.extra import import_extra

VALIDATION_STRIDE = 5
"""Every fifth digit, counted in the order (class, position in the data set), is a validation digit."""

PIXEL_MAXIMUM = 16.0
"""A pixel counts the inked cells of a 4x4 block, so it lies in 0..16 whatever the data are."""


class DigitsDataModule(SetsDataModule):
    """The 1,797 digits of 8x8 pixels that come with scikit-learn: 1,437 to train on and 360 to validate on.

    Nothing is downloaded. The split is fixed: the digits are put in the order of their class, equals in the
    order of the data set, and every :data:`VALIDATION_STRIDE`-th is taken out for validation. No random
    number enters, so no seed can change it, and every class gives a fifth of its digits (to within one).
    There is no third set: ``test_dataloader`` and ``predict_dataloader`` return the validation digits too.

    An item is ``(image, label)``: a float32 tensor of shape ``(1, 8, 8)`` with values in [-1, 1], and an
    int64 scalar in 0..9. The scaling, ``pixel / 8 - 1``, follows from the range of a pixel alone and uses no
    statistic of the data.

    Args:
        batch_size: examples in a batch of the training loader.
        val_batch_size: examples in a batch of the other loaders.

    Raises:
        ValueError: a batch size is below 1.

    Example:
        >>> data = DigitsDataModule(batch_size=256)
        >>> data.setup()
        >>> len(data.train_set), len(data.val_set)
        (1437, 360)

    Source: E. Alpaydin and C. Kaynak, *Optical Recognition of Handwritten Digits*, UCI Machine Learning
    Repository, 1998; scikit-learn ships its test part.
    """

    def __init__(self, batch_size: int = 256, val_batch_size: int = 360) -> None:
        super().__init__(batch_size, val_batch_size)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load both sets; ``stage`` makes no difference."""
        digits = import_extra("sklearn.datasets", "vision", "The digits come with scikit-learn").load_digits()
        images = torch.from_numpy(digits.images / (PIXEL_MAXIMUM / 2) - 1).to(torch.float32).unsqueeze(1)
        labels = torch.from_numpy(digits.target).to(torch.int64)
        train, val = split_indices(digits.target)
        self.train_set = TensorDataset(images[train], labels[train])
        self.val_set = TensorDataset(images[val], labels[val])


def split_indices(labels: np.ndarray[Any, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Split positions into training and validation, class by class and without randomness.

    Args:
        labels: the class of each example, shape ``(n,)``.

    Returns:
        The positions to train on and the positions to validate on, each ascending. Together they are 0..n-1.

    Example:
        >>> train, val = split_indices(np.array([0, 1] * 5))
        >>> val.tolist()
        [0, 1]
    """
    by_class = np.argsort(labels, kind="stable")
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_class[::VALIDATION_STRIDE]] = True
    return torch.from_numpy(np.flatnonzero(~chosen)), torch.from_numpy(np.flatnonzero(chosen))
