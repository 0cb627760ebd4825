"""Images replaced, once and for all, by fixed features of them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_dp.data.images import DataError, ImageArray, ImageDataModule, normalise

CHUNK = 20
"""Images that are transformed at once: few, so that what lies between stays in the processor's cache."""

FORMAT = 1
"""Another number whenever what is kept in the cache changes."""


class FeatureArray(Dataset[tuple[Tensor, int]]):
    """Features in memory or in a mapped file; an item is a float16 tensor and a label.

    Args:
        features: ``(n, ...)`` float16.
        labels: one for each.
    """

    def __init__(self, features: Tensor, labels: list[int]) -> None:
        self.features, self.labels = features, labels

    def __len__(self) -> int:
        return len(self.labels)

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.features[index], self.labels[index]


class FixedFeatures(L.LightningDataModule):
    """The images of another data module, seen through a network that is not trained.

    Each image is normalised by the other module's ``mean`` and ``std`` and put through ``features`` once, before
    training. The results are kept as float16 in a file in ``cache_dir`` and read from there, so the second run starts at
    once. On the device they become the module's type. There are no augmented views: the images are gone.

    ``features`` must be public and work on each image alone (checked on four images), as
    :class:`~lightning_dp.models.Scattering2d` does. Then the features of an example are part of that example, and
    training on them is as private as training on the images.

    Args:
        images: where the images come from; small ones, which are held in memory as uint8.
        features: maps float32 images ``(n, channels, height, width)`` to ``(n, ...)``. Used in eval mode.
        batch_size: see :class:`~lightning_dp.data.images.ImageDataModule`.
        val_batch_size: likewise.
        cache_dir: where the features are kept; ``None`` for ``~/.cache/lightning_dp``.

    Raises:
        DataError: in ``prepare_data`` or ``setup``: the images are not in memory, ``features`` mixes images, has
            parameters to train, or gives numbers that are not finite in float16.

    Source: F. Tramèr and D. Boneh, *Differentially Private Learning Needs Better Features (or Much More Data)*, ICLR 2021
    (arXiv 2011.11660).
    """

    def __init__(
        self,
        images: ImageDataModule,
        features: nn.Module,
        batch_size: int = 4096,
        val_batch_size: int = 500,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("val_batch_size", val_batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dp"
        self.images, self.features = images, features.eval()
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.cache_dir = home if cache_dir is None else Path(cache_dir)
        self.train_set: Dataset[Any]
        self.val_set: Dataset[Any]
        self.test_set: Dataset[Any]

    @override
    def prepare_data(self) -> None:
        """Compute what is not yet in the cache, on one process of each machine."""
        self.images.prepare_data()
        self.setup()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Map the features of all three sets into memory, once; ``stage`` makes no difference."""
        if hasattr(self, "train_set"):
            return
        trained = [name for name, p in self.features.named_parameters() if p.requires_grad]
        if trained:
            raise DataError(
                f"features={type(self.features).__name__} has parameters to train ({', '.join(trained[:3])}): expected a "
                "fixed network. Freeze it with requires_grad_(False) if it is public, or make it part of the model."
            )
        self.images.setup()
        self.train_set, self.val_set = self._seen(self.images.train_set), self._seen(self.images.val_set)
        same = self.images.test_set is self.images.val_set
        self.test_set = self.val_set if same else self._seen(self.images.test_set)

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Give the features the module's type."""
        features, *rest = batch
        return features.to(self._dtype()) if features.dtype == torch.float16 else features, *rest

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """Return the training examples, shuffled."""
        return DataLoader(self.train_set, batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return the validation examples, in order."""
        return DataLoader(self.val_set, batch_size=self.val_batch_size)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the test examples, in order."""
        return DataLoader(self.test_set, batch_size=self.val_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the test examples, in order."""
        return self.test_dataloader()

    def _seen(self, images: Dataset[Any]) -> FeatureArray:
        if not isinstance(images, ImageArray):
            raise DataError(
                f"images of type {type(images).__name__}: expected images held in memory, as of up to 64 pixels. Compute "
                "features of larger images beforehand."
            )
        cached = self.cache_dir / f"features-{self._fingerprint(images.images)}.npy"
        if not cached.is_file():
            self._compute(images.images, cached)
        # copy-on-write: nothing ever writes, and torch wants memory that it could
        return FeatureArray(torch.from_numpy(np.load(cached, mmap_mode="c")), images.labels)

    def _fingerprint(self, images: Tensor) -> str:
        """Names the images and what ``features`` makes of the first ones, whatever it is written like."""
        few = self._checked(images, 0, 4)
        alone = torch.cat([self._transform(image) for image in images[:4].unsqueeze(1)])
        if not torch.allclose(few.float(), alone.float(), rtol=1e-2, atol=1e-2 * float(few.float().std()) + 1e-6):
            raise DataError(
                f"features={type(self.features).__name__} gives an image other features when it is among others: expected "
                "each image alone to decide, or clipping its gradient would not protect it. Do without batch statistics."
            )
        rounded = (few.float() * 256).round().to(torch.int32)  # the last bits depend on the number of threads
        said = hashlib.sha256(f"{FORMAT} {tuple(images.shape)} {self.images.mean} {self.images.std}".encode())
        said.update(images.numpy().tobytes())
        said.update(rounded.numpy().tobytes())
        return said.hexdigest()[:32]

    def _compute(self, images: Tensor, cached: Path) -> None:
        shape = (len(images), *self._transform(images[:1]).shape[1:])
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_name(f"{cached.name}.{os.getpid()}.npy")
        try:
            file = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float16, shape=shape)
            name = type(self.features).__name__
            for start in tqdm(range(0, len(images), CHUNK), f"{name} of {len(images)} images", leave=False):
                file[start : start + CHUNK] = self._checked(images, start, CHUNK).numpy()
            file.flush()
            unfinished.replace(cached)
        finally:
            unfinished.unlink(missing_ok=True)

    def _checked(self, images: Tensor, start: int, count: int) -> Tensor:
        part = self._transform(images[start : start + count])
        if not bool(part.isfinite().all()):
            raise DataError(
                f"features={type(self.features).__name__} gives numbers that are not finite in float16 for images {start} "
                f"to {start + len(part) - 1}: expected at most 65504. Scale the features down."
            )
        return part

    @torch.no_grad()
    def _transform(self, images: Tensor) -> Tensor:
        features: Tensor = self.features(normalise(images, self.images.mean, self.images.std))
        return features.to(torch.float16)

    def _dtype(self) -> torch.dtype:
        module = None if self.trainer is None else self.trainer.lightning_module
        parameters = () if module is None else module.parameters()
        return next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
