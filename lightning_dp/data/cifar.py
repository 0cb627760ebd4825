"""CIFAR-10 and CIFAR-100 from torchvision."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args
from urllib.error import URLError

import numpy as np
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_dp.data.images import DataError, ImageArray, ImageDataModule, Triple
from lightning_dp.models.extra import import_extra

Name = Literal["cifar10", "cifar100"]
CIFAR_MEAN: Triple = (0.49139968, 0.48215841, 0.44653091)
CIFAR_STD: Triple = (0.24703223, 0.24348513, 0.26158784)


class CIFARDataModule(ImageDataModule):
    """CIFAR-10 or CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels, in memory as uint8.

    As in the paper, final runs train on all 50,000 (``held_out=0``) and validate on the test images; to choose settings,
    hold the last 5,000 training images out and validate on those.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: folder of the data set in the form torchvision keeps it.
        download: fetch it if it is not there. The archive's checksum is verified.
        held_out: training images, the last ones, that are validated on instead of trained on.
        batch_size: see :class:`~lightning_dp.data.sets.SetsDataModule`.
        val_batch_size: likewise.
        num_workers: likewise.
        mean: likewise; the paper takes CIFAR-10's for both data sets.
        std: likewise.

    Raises:
        DataError: in ``prepare_data`` or ``setup``, if the data are not there, broken, or cannot be downloaded.
        ValueError: a number is out of range or the name unknown.

    Source: A. Krizhevsky 2009, *Learning multiple layers of features from tiny images*; constants and split: De et al.
    2022 (arXiv 2204.13650) and their code.
    """

    def __init__(
        self,
        name: Name = "cifar10",
        root: str | Path = "data",
        download: bool = True,
        held_out: int = 0,
        batch_size: int = 4096,
        val_batch_size: int = 500,
        num_workers: int = 0,
        mean: Triple = CIFAR_MEAN,
        std: Triple = CIFAR_STD,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, mean=mean, std=std
        )
        if name not in get_args(Name):
            raise ValueError(f"name={name!r}: expected one of {', '.join(get_args(Name))}.")
        if held_out < 0:
            raise ValueError(f"held_out={held_out}: expected at least 0, such as 5000.")
        self.name, self.root, self.download, self.held_out = name, Path(root), download, held_out

    @override
    def prepare_data(self) -> None:
        """Download and verify the archive on one process, if it is not there and ``download`` is set."""
        if self.download:
            self._open(train=True, download=True)

    @override
    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return all three sets; validation and test are the same unless images are held out."""
        train, test = (self._open(train=train, download=False) for train in (True, False))
        images, labels = np.asarray(train.data), np.asarray(train.targets, dtype=np.int64)
        if self.held_out >= len(labels):
            raise ValueError(f"held_out={self.held_out}: expected less than the {len(labels)} training images.")
        kept = len(labels) - self.held_out
        test_set = ImageArray(np.asarray(test.data), np.asarray(test.targets, dtype=np.int64))
        val_set = ImageArray(images[kept:], labels[kept:]) if self.held_out else test_set
        return ImageArray(images[:kept], labels[:kept]), val_set, test_set

    def _open(self, *, train: bool, download: bool) -> Any:
        datasets = import_extra("torchvision.datasets", "vision", f"{self.name} is read by torchvision")
        kind = datasets.CIFAR10 if self.name == "cifar10" else datasets.CIFAR100
        try:
            return kind(str(self.root), train=train, download=download)
        except (URLError, ConnectionError, TimeoutError) as error:
            raise DataError(
                f"root={str(self.root)!r}: {self.name} is not there and could not be downloaded ({type(error).__name__}): "
                "expected a connection or the data. Without one, put the archive from "
                f"www.cs.toronto.edu/~kriz/cifar.html into that folder."
            ) from error
        except RuntimeError as error:
            raise DataError(
                f"root={str(self.root)!r}: {self.name} is not there or its checksum is wrong: expected the files of "
                "torchvision. Set download=True, or remove broken files and try again."
            ) from error
