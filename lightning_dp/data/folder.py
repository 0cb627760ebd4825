"""Any folder of images, one folder a class: ImageNet, Places-365, CIFAR as JPEG files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from typing_extensions import override

from lightning_dp.data.files import CorruptImageError, Decoding, ImageFiles, Listing, decode
from lightning_dp.data.images import DataError, ImageArray, ImageDataModule, Images, Labels, Triple, hold_out_evenly

IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
SMALL = 64
"""Images of up to this edge are decoded once and kept in memory unless told otherwise."""

CACHE_FORMAT = 1
"""Another number whenever what is kept in the cache changes."""


class FolderImages(Dataset[tuple[Tensor, int]]):
    """Images decoded when they are asked for; an item is a uint8 tensor ``(3, size, size)`` and a label.

    Args:
        root: the folder.
        names: the images, relative to it.
        labels: their classes.
        size: edge in pixels.
        how: see :class:`lightning_dp.data.files.Decoding`.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], size: int, how: Decoding) -> None:
        self.root, self.names, self.labels, self.size, self.how = root, names, labels, size, how

    def __len__(self) -> int:
        return len(self.names)

    def facts(self) -> str:
        """A name for what is in it, without reading it: another one when files come, go or are written anew."""
        digest = hashlib.sha256(repr((self.size, *self.how.key())).encode())
        for name, label in zip(self.names, self.labels, strict=True):
            found = (self.root / name).stat()
            digest.update(f"{name} {label} {found.st_size} {found.st_mtime_ns}".encode())
        return digest.hexdigest()

    @override
    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.names[index]
        image = decode(name, (self.root / name).read_bytes(), self.size, self.how)
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), self.labels[index]


class ImageFolderDataModule(ImageDataModule):
    """Images in folders ``<root>/<train>/<class>/`` and ``<root>/<val>/<class>/``, or in a tar archive laid out like it.

    Images of up to 64 pixels are decoded once, kept in memory as uint8 and cached on disk, so that the next run starts at
    once; larger ones are decoded when they are asked for, by ``num_workers`` processes.

    As in the paper, training images can be held out for validation: for ImageNet and Places-365 10,000, evenly over the
    classes and without randomness (which images the paper held out depends on the order of its copy of the data). The
    images of the folder ``val`` are then the test set; without, they are both.

    Args:
        root: the folder or archive; see :class:`lightning_dp.data.files.ImageFiles` for where it is looked for.
        num_classes: how many classes there must be.
        size: edge in pixels that the network is given.
        train_size: edge of the training images; larger than ``size`` for random crops of them. ``None`` for ``size``.
        train: name of the folder of training images.
        val: name of the folder of validation images.
        held_out: training images that are validated on instead of trained on.
        resize: cut the largest square out of the middle and resize it (bicubic); otherwise another size is an error.
        crop_padding: with ``resize``, cut a square of size / (size + crop_padding) of the shorter side instead: 32 gives
            87.5 % for 224 and, for ``train_size=268``, 89.3 %.
        antialias: with ``resize``, average over the pixels that become one, as Pillow does. TensorFlow's bicubic does not.
        convert: turn images of other modes into RGB; otherwise they are an error.
        skip_corrupt: go on without images that cannot be decoded, naming them in a warning. All images are then decoded
            once in ``prepare_data`` or ``setup``. It changes the number of examples, which is public.
        in_memory: decode all images at the start; ``None`` does so up to 64 pixels.
        cache_dir: where decoded images are kept; ``None`` for ``~/.cache/lightning_dp``.
        batch_size: see :class:`~lightning_dp.data.sets.SetsDataModule`.
        val_batch_size: likewise.
        num_workers: likewise.
        mean: likewise.
        std: likewise.

    Raises:
        DataError: in ``prepare_data`` or ``setup``: no such folder, another number of classes, an image that is broken or
            of another size or mode (named), or different classes for training and validation.
        ValueError: a number is out of range.
    """

    def __init__(
        self,
        root: str | Path,
        num_classes: int,
        size: int = 224,
        train_size: int | None = None,
        train: str = "train",
        val: str = "val",
        held_out: int = 0,
        resize: bool = False,
        crop_padding: int = 0,
        antialias: bool = True,
        convert: bool = False,
        skip_corrupt: bool = False,
        in_memory: bool | None = None,
        cache_dir: str | Path | None = None,
        batch_size: int = 4096,
        val_batch_size: int = 100,
        num_workers: int = 0,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
    ) -> None:
        super().__init__(
            batch_size=batch_size, val_batch_size=val_batch_size, num_workers=num_workers, mean=mean, std=std
        )
        for name, value in (("size", size), ("num_classes", num_classes), ("train_size", train_size or size)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected at least 1.")
        self.root, self.num_classes, self.held_out = root, num_classes, held_out
        self.sizes = {train: train_size or size, val: size}
        self.train, self.val = train, val
        if crop_padding < 0:
            raise ValueError(f"crop_padding={crop_padding}: expected at least 0, such as 32.")
        if not resize and (crop_padding or not antialias):
            raise ValueError(
                f"crop_padding={crop_padding}, antialias={antialias}: expected resize=True with them. Set it."
            )
        self.how, self.skip_corrupt = Decoding(resize, convert, crop_padding, antialias), skip_corrupt
        self.in_memory = max(self.sizes.values()) <= SMALL if in_memory is None else in_memory
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_dp"
        self._listed: tuple[ImageFiles, dict[str, Listing]] | None = None
        self.cache_dir = home if cache_dir is None else Path(cache_dir)

    @override
    def prepare_data(self) -> None:
        """Check the folders, and decode small images into the cache, on one process of each machine."""
        files, listings = self._listings()
        if self.in_memory:
            for split in (self.train, self.val):
                self._decoded(files, split, listings[split])

    @override
    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        """Return all three sets; validation and test are the same unless images are held out."""
        files, listings = self._listings()
        if self.in_memory:
            train, test = (self._decoded(files, split, listings[split]) for split in (self.train, self.val))
            kept, out = hold_out_evenly(train[1], self.held_out)
            test_set = ImageArray(*test)
            val_set = ImageArray(train[0][out], train[1][out]) if self.held_out else test_set
            return ImageArray(train[0][kept], train[1][kept]), val_set, test_set
        if self.skip_corrupt:
            listings = {split: self._without_corrupt(files, split, listing) for split, listing in listings.items()}
        labels = np.asarray(listings[self.train].labels)
        kept, out = hold_out_evenly(labels, self.held_out)
        test_large = self._large(files, listings[self.val], self.sizes[self.val])
        val_large = self._large(files, listings[self.train], self.sizes[self.val], out) if self.held_out else test_large
        return self._large(files, listings[self.train], self.sizes[self.train], kept), val_large, test_large

    def _listings(self) -> tuple[ImageFiles, dict[str, Listing]]:
        if self._listed is None:
            self._listed = self._list()
        return self._listed

    def _list(self) -> tuple[ImageFiles, dict[str, Listing]]:
        files = ImageFiles(self.root)
        listings = {split: files.listing(split) for split in (self.train, self.val)}
        for split, listing in listings.items():
            if len(listing.classes) != self.num_classes:
                raise DataError(
                    f"num_classes={self.num_classes}: expected as many folders in {files.root / split}, which has "
                    f"{len(listing.classes)} ({', '.join(listing.classes[:4])}, ...). Give the right number or root."
                )
        if listings[self.train].classes != listings[self.val].classes:
            odd = sorted(set(listings[self.train].classes) ^ set(listings[self.val].classes))
            raise DataError(
                f"{self.train!r} and {self.val!r} of {files.root} have different classes ({', '.join(odd[:4])}): expected "
                "the same folders in both. Labels are positions among the sorted names."
            )
        if files.is_archive and not self.in_memory:
            raise DataError(
                f"root={str(self.root)!r} is an archive and in_memory is False: expected a folder, from which single images "
                "can be read. Unpack it."
            )
        return files, listings

    def _large(
        self, files: ImageFiles, listing: Listing, size: int, positions: Sequence[int] | Labels | None = None
    ) -> FolderImages:
        chosen = range(len(listing.names)) if positions is None else positions
        return FolderImages(
            files.root,
            [listing.names[i] for i in chosen],
            [listing.labels[i] for i in chosen],
            size,
            self.how,
        )

    def _decoded(self, files: ImageFiles, split: str, listing: Listing) -> tuple[Images, Labels]:
        """The images and labels of a split, from the cache if they are there."""
        size = self.sizes[split]
        cached = self.cache_dir / (
            files.fingerprint(CACHE_FORMAT, split, size, *self.how.key(), self.skip_corrupt) + ".npz"
        )
        if cached.is_file():
            with np.load(cached) as arrays:
                _say_what_is_left_out(split, arrays["left_out"].tolist())
                return arrays["images"], arrays["labels"]
        images = np.zeros((len(listing.names), size, size, 3), dtype=np.uint8)
        left_out = self._decode_all(files, split, listing, into=images)
        kept = [i for i, name in enumerate(listing.names) if name not in left_out]
        images, labels = images[kept], np.asarray(listing.labels, dtype=np.int64)[kept]
        cached.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cached.with_name(f"{cached.name}.{os.getpid()}.npz")
        np.savez(unfinished, images=images, labels=labels, left_out=np.asarray(left_out, dtype=str))
        unfinished.replace(cached)
        _say_what_is_left_out(split, left_out)
        return images, labels

    def _without_corrupt(self, files: ImageFiles, split: str, listing: Listing) -> Listing:
        left_out = self._decode_all(files, split, listing)
        _say_what_is_left_out(split, left_out)
        kept = [i for i, name in enumerate(listing.names) if name not in left_out]
        names, labels = [listing.names[i] for i in kept], [listing.labels[i] for i in kept]
        return Listing(listing.classes, tuple(names), tuple(labels))

    def _decode_all(self, files: ImageFiles, split: str, listing: Listing, into: Images | None = None) -> list[str]:
        """Decode a split's images, one by one, and return the names of those that are broken and may be skipped."""
        place = {name: i for i, name in enumerate(listing.names)}
        left_out = []
        for name, content in tqdm(files.read(listing.names), f"Decoding {split}", total=len(place), leave=False):
            try:
                image = decode(name, content, self.sizes[split], self.how)
            except CorruptImageError:
                if not self.skip_corrupt:
                    raise
                left_out.append(name)
                continue
            if into is not None:
                into[place[name]] = image
        return sorted(left_out)


def _say_what_is_left_out(split: str, names: list[str]) -> None:
    if names:
        rank_zero_warn(f"{len(names)} images of {split!r} cannot be decoded and are left out: {', '.join(names)}")
