"""Images replaced, once and for all, by fixed features of them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_dp.data.folder import FolderImages
from lightning_dp.data.images import DataError, ImageArray, ImageDataModule, normalise, type_of
from lightning_dp.data.kept_array import Array, keep_array
from lightning_dp.data.sets import SetsDataModule

CHUNK = 20
"""Images held in memory that a CPU transforms at once: few, so that what lies between stays in its cache."""

KEPT_AS = {"float16": torch.float16, "float32": torch.float32}

FEW = 4
"""Images whose features are looked at to tell what the network does."""

FORMAT = 2
"""Another number whenever what is kept in the cache changes."""


class FixedFeatures(SetsDataModule):
    """The images of another data module, seen through a network that is not trained.

    Each image is normalised by the other module's ``mean`` and ``std`` and put through ``features`` once, before
    training. The results are kept in a file in ``cache_dir``, which is mapped into memory, so the second run starts at
    once, and one that was stopped goes on where it was. On the device they become the module's type. There are no augmented
    views: the images are gone.

    **The file holds private data.** Features say much about an image, and nothing protects them: keep ``cache_dir`` where the
    images may be, and delete it with them.

    ``features`` must be public and work on each image alone (checked on four images), as
    :class:`~lightning_dp.models.Scattering2d` does, and :class:`~lightning_dp.models.FrozenBody` of a network whose last
    layer is trained. Then the features of an example are part of that example, and
    training on them is as private as training on the images.

    Args:
        images: where the images come from. Those in memory are told from others by their contents, those in files by names,
            sizes and times of change.
        features: maps float32 images ``(n, channels, height, width)`` to ``(n, ...)``. Used in eval mode.
        batch_size: see :class:`~lightning_dp.data.sets.SetsDataModule`.
        val_batch_size: likewise.
        cache_dir: where the features are kept; ``None`` for ``~/.cache/lightning_dp``.
        dtype: of what is kept: ``"float16"``, or ``"float32"`` for the very numbers that ``features`` gives.
        device: where they are computed, such as ``"cuda"``; the CPU by default.

    Raises:
        DataError: in ``prepare_data`` or ``setup``: the images are neither in memory nor in files, ``features`` mixes images,
            has parameters to train, or gives numbers that are not finite.

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
        dtype: Literal["float16", "float32"] = "float16",
        device: str = "cpu",
    ) -> None:
        super().__init__(batch_size, val_batch_size)
        if dtype not in KEPT_AS:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(map(repr, KEPT_AS))}.")
        self.dtype, self.device = KEPT_AS[dtype], torch.device(device)
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dp"
        self.images, self.features = images, features.eval()
        self.cache_dir = home if cache_dir is None else Path(cache_dir)

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
        self.features.to(self.device)
        self.train_set, self.val_set = self._seen(self.images.train_set), self._seen(self.images.val_set)
        same = self.images.test_set is self.images.val_set
        self.test_set = self.val_set if same else self._seen(self.images.test_set)
        self.features = nn.Identity()  # let go: no step has to look at it, and its memory is free

    @override
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Give the features the module's type."""
        features, *rest = batch
        return features.to(type_of(self.trainer)), *rest

    def _seen(self, images: Dataset[Any]) -> TensorDataset:
        if not isinstance(images, ImageArray | FolderImages):
            raise DataError(
                f"images of type {type(images).__name__}: expected images held in memory or in files, as ImageFolderDataModule "
                "has them. Compute features of others beforehand."
            )
        few = self._few(images)
        cached = self._file(images, few)
        if not cached.is_file():
            self._compute(images, few, cached)
        # copy-on-write: nothing ever writes, and torch wants memory that it could
        return TensorDataset(torch.from_numpy(np.load(cached, mmap_mode="c")), torch.tensor(images.labels))

    def _few(self, images: ImageArray | FolderImages) -> Tensor:
        """The features of the first images, found to be their own."""
        first = torch.stack([images[index][0] for index in range(min(FEW, len(images)))])
        few = self._checked(first, 0)
        if not self._alike(few, torch.cat([self._transform(image) for image in first.unsqueeze(1)])):
            raise DataError(
                f"features={type(self.features).__name__} gives an image other features when it is among others: expected "
                "each image alone to decide, or clipping its gradient would not protect it. Do without batch statistics."
            )
        return few

    def _alike(self, one: Tensor, other: Tensor) -> bool:
        """Whether they are the same up to what threads, batches and devices change."""
        scale = float(one.float().std()) if one.numel() > 1 else 0.0
        return torch.allclose(one.float(), other.float(), rtol=1e-2, atol=1e-2 * scale + 1e-6)

    def _file(self, images: ImageArray | FolderImages, few: Tensor) -> Path:
        """Where these features of these images are kept or will be: told by the name, and by the first rows."""
        name = f"features-{self._fingerprint(images)}"
        for number in count():
            path = self.cache_dir / f"{name}-{number}.npy"
            if not path.is_file():
                return path
            kept = torch.from_numpy(np.load(path, mmap_mode="r")[: len(few)].copy())
            if kept.shape == few.shape and self._alike(few, kept):
                return path
        raise AssertionError("count() does not end")

    def _fingerprint(self, images: ImageArray | FolderImages) -> str:
        """Names the images, and the network by its weights and by what it prints as."""
        said = hashlib.sha256(f"{FORMAT} {self.images.mean} {self.images.std} {self.dtype}".encode())
        if isinstance(images, ImageArray):
            said.update(f"{tuple(images.images.shape)}".encode() + images.images.numpy().tobytes())
        else:
            said.update(images.facts().encode())
        said.update(f"{self.features}".encode())
        for name, tensor in self.features.state_dict().items():
            said.update(name.encode() + tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return said.hexdigest()[:32]

    def _compute(self, images: ImageArray | FolderImages, few: Tensor, cached: Path) -> None:
        name, within = type(self.features).__name__, self.features
        while "network" in (parts := dict(within.named_children())):
            within = parts["network"]
        if within is not self.features:
            name = f"{name} of {type(within).__name__}"

        def rows(start: int) -> Iterator[Array]:
            with tqdm(initial=start, desc=f"{name}, images", total=len(images), leave=False) as bar:
                for piece in self._pieces(images, start):
                    yield self._checked(piece, start).numpy()
                    start += len(piece)
                    bar.update(len(piece))

        def belong(left: Array) -> bool:
            return self._alike(few[: len(left)], torch.from_numpy(left[: len(few)].copy()))

        kept_as = np.float16 if self.dtype == torch.float16 else np.float32
        keep_array(cached, (len(images), *few.shape[1:]), kept_as, rows, belong)
        rank_zero_info(
            f"lightning_dp: {name} of {len(images)} images is kept in {cached}. That is private data: nothing protects it."
        )

    def _at_once(self, images: ImageArray | FolderImages) -> int:
        return CHUNK if isinstance(images, ImageArray) and self.device.type == "cpu" else self.val_batch_size

    def _pieces(self, images: ImageArray | FolderImages, start: int) -> Iterator[Tensor]:
        at_once = self._at_once(images)
        if isinstance(images, ImageArray):
            yield from torch.split(images.images[start:], at_once)
        else:
            left = Subset(images, range(start, len(images)))
            loader = DataLoader(left, batch_size=at_once, num_workers=self.images.num_workers)
            yield from (piece for piece, _ in loader)

    def _checked(self, images: Tensor, start: int) -> Tensor:
        part = self._transform(images)
        if not bool(part.isfinite().all()):
            most = f"at most {torch.finfo(self.dtype).max:.5g}" if self.dtype == torch.float16 else "finite numbers"
            raise DataError(
                f"features={type(self.features).__name__} gives numbers that are not finite in {str(self.dtype)[6:]} for "
                f"images {start} to {start + len(part) - 1}: expected {most}. Scale the features down."
            )
        return part

    @torch.no_grad()
    def _transform(self, images: Tensor) -> Tensor:
        there = images.to(self.device)
        features: Tensor = self.features(normalise(there, self.images.mean, self.images.std))
        return features.to(self.dtype).cpu()
