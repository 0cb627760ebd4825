"""What all image data modules share: uint8 images that are normalised on the device, and a split."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_dp.data.sets import SetsDataModule

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]
Triple = tuple[float, float, float]


class DataError(ValueError):
    """Data that are missing or not what was asked for. The message names the value, the expectation and the remedy."""


class ImageArray(Dataset[tuple[Tensor, int]]):
    """Decoded images in memory; an item is a uint8 tensor ``(3, height, width)`` and a label.

    Args:
        images: ``(n, height, width, 3)`` uint8.
        labels: ``(n,)``.
    """

    def __init__(self, images: Images, labels: Labels) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
        self.labels = labels.tolist()

    def __len__(self) -> int:
        return len(self.labels)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


class ImageDataModule(SetsDataModule):
    """Base of the image data modules. A batch on the device is ``(images, labels)``, images float32 and normalised.

    Images travel as uint8 and are normalised on the device, for training, validation and prediction alike; augmented
    views are made of the normalised images, in training alone, by :class:`~lightning_dp.AugmentationMultiplicity`.
    ``mean`` and ``std`` are public constants: computed from private images they would be outside the guarantee.

    Args:
        batch_size: see :class:`~lightning_dp.data.sets.SetsDataModule`.
        val_batch_size: likewise.
        num_workers: processes that load images. 0 is best for images in memory.
        mean: per channel, of images scaled to [0, 1].
        std: per channel, likewise.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, *, batch_size: int, val_batch_size: int, num_workers: int, mean: Triple, std: Triple) -> None:
        super().__init__(batch_size, val_batch_size)
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}: expected at least 0.")
        if min(std) <= 0:
            raise ValueError(f"std={std}: expected numbers above 0.")
        self.num_workers, self.mean, self.std = num_workers, mean, std

    @abstractmethod
    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return the training, validation and test sets."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load the sets, once; ``stage`` makes no difference."""
        if not hasattr(self, "train_set"):
            self.train_set, self.val_set, self.test_set = self.load()

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Normalise uint8 images; anything else stays as it is."""
        images, *rest = batch
        if images.dtype == torch.uint8:
            images = normalise(images, self.mean, self.std).to(type_of(self.trainer))
        return images, *rest

    @override
    def loader(self, dataset: Dataset[Any], batch_size: int, *, shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            batch_size=batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def type_of(trainer: Any) -> torch.dtype:
    """The floating-point type of the module in training, which is that of its images."""
    module = None if trainer is None else trainer.lightning_module
    parameters = () if module is None else module.parameters()
    return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)


def normalise(images: Tensor, mean: Triple, std: Triple) -> Tensor:
    """Scale uint8 images ``(batch, 3, height, width)`` to [0, 1], subtract ``mean`` and divide by ``std``.

    Example:
        >>> pixel = torch.full((1, 3, 1, 1), 51, dtype=torch.uint8)
        >>> normalise(pixel, (0.2, 0.2, 0.0), (1, 1, 0.1))[0, :, 0, 0].round(decimals=3)
        tensor([0., 0., 2.])
    """
    shift, scale = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in (mean, std))
    return (images.float() / 255 - shift) / scale


def hold_out_evenly(labels: Labels, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split positions into training and held out, evenly over the classes and without randomness.

    Positions are put in the order (class, position) and ``count`` of them taken out at even distances.

    Returns:
        The positions to train on and those held out, each ascending.

    Raises:
        ValueError: ``count`` is not in [0, n).

    Example:
        >>> train, held_out = hold_out_evenly(np.array([0, 1] * 5), 2)
        >>> held_out.tolist()
        [4, 5]
    """
    n = len(labels)
    if not 0 <= count < n:
        raise ValueError(f"held_out={count}: expected at least 0 and less than the {n} training images.")
    by_class = np.argsort(labels, kind="stable")
    chosen = np.zeros(n, dtype=bool)
    chosen[by_class[((np.arange(count) + 0.5) * n / max(count, 1)).astype(np.int64)]] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)
