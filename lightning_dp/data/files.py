"""Folders and archives of images: what is in them, and their decoding."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lightning_dp.data.images import DataError, Images
from lightning_dp.models.extra import import_extra

VARIABLE = "LIGHTNING_DP_DATA"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Files that count as images."""

BESIDE = "../shared/data"


class ImageError(DataError):
    """An image that is not of the size or mode asked for."""


class CorruptImageError(ImageError):
    """An image that cannot be decoded."""


@dataclass(frozen=True)
class Listing:
    """The images of one split, ``<split>/<class>/.../<name>``, in the order (class, name).

    Attributes:
        classes: names of the classes, sorted; a label is a position in it.
        names: names of the images, relative to the root.
        labels: their classes.
    """

    classes: tuple[str, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]


class ImageFiles:
    """The images below a folder or inside a tar archive.

    Args:
        root: folder or archive. A relative path that does not exist is looked for below the folder that the environment
            variable ``LIGHTNING_DP_DATA`` names (``../shared/data`` if it is not set).

    Raises:
        DataError: there is no such folder or archive.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = _locate(Path(root))
        self.is_archive = self.root.is_file()
        if self.is_archive and not tarfile.is_tarfile(self.root):
            raise DataError(f"root={str(root)!r} is a file but no tar archive: expected a folder or an archive.")
        self._found: list[str] | None = None

    def listing(self, split: str) -> Listing:
        """The images of a split.

        Raises:
            DataError: the split's folder is missing, or has no class with an image.
        """
        names = sorted(
            name
            for name in self._all()
            if name.startswith(f"{split}/") and name.count("/") > 1 and name.lower().endswith(SUFFIXES)
        )
        if not names:
            there = sorted({name.split("/")[0] for name in self._all()})
            raise DataError(
                f"root={str(self.root)!r} has no images {split}/<class>/<name>: expected a folder for each class in "
                f"{split!r}. It holds {', '.join(there[:8]) or 'nothing'}; name the folders with train=... and val=..."
            )
        of_names = ["/".join(name.split("/")[1:-1]) for name in names]
        classes = tuple(sorted(set(of_names)))
        number = {name: label for label, name in enumerate(classes)}
        order = sorted(range(len(names)), key=lambda i: (number[of_names[i]], names[i]))
        return Listing(classes, tuple(names[i] for i in order), tuple(number[of_names[i]] for i in order))

    def read(self, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        """Yield name and content of each image, in an order of the file system's own choosing."""
        if not self.is_archive:
            for name in names:
                yield name, (self.root / name).read_bytes()
            return
        wanted = set(names)
        with tarfile.open(self.root, "r|*") as archive:
            for member in archive:
                name = _clean(member.name)
                content = archive.extractfile(member) if name in wanted else None
                if content is not None:
                    yield name, content.read()

    def fingerprint(self, *settings: object) -> str:
        """A name for what is here and how it is decoded: another one when files come, go or are written anew."""
        digest = hashlib.blake2b(digest_size=8)
        files = [self.root] if self.is_archive else [self.root / name for name in sorted(self._all())]
        for part in (self.root.resolve(), *settings):
            digest.update(repr(part).encode())
        for file in files:
            facts = file.stat()
            digest.update(f"{file} {facts.st_size} {facts.st_mtime_ns}".encode())
        return f"{self.root.name.split('.')[0]}-{digest.hexdigest()}"

    def _all(self) -> list[str]:
        """Every file's name."""
        if self._found is None:
            if self.is_archive:
                with tarfile.open(self.root, "r|*") as archive:
                    self._found = [_clean(member.name) for member in archive if member.isfile()]
            else:
                self._found = [
                    (Path(folder) / name).relative_to(self.root).as_posix()
                    for folder, _, names in os.walk(self.root, followlinks=True)
                    for name in names
                ]
        return self._found


@dataclass(frozen=True)
class Decoding:
    """How an image becomes one of the size that is asked for.

    Attributes:
        resize: cut a square out of the middle and resize it (bicubic); otherwise another size is an error.
        convert: turn grey, palette, transparent and CMYK images into RGB; otherwise another mode is an error.
        crop_padding: with ``resize``, the square's edge is size / (size + crop_padding) of the shorter side, rounded down.
        antialias: with ``resize``, average over the pixels that become one where the square is larger than ``size``.
    """

    resize: bool = False
    convert: bool = False
    crop_padding: int = 0
    antialias: bool = True

    def key(self) -> tuple[object, ...]:
        """For the names of caches: another one wherever images come out otherwise."""
        usual = Decoding(self.resize, self.convert)
        more = () if self == usual else (self.crop_padding, self.antialias)
        return (self.resize, self.convert, *more)


def decode(name: str, content: bytes, size: int, how: Decoding) -> Images:
    """Decode one image to ``(size, size, 3)`` uint8.

    Args:
        name: for the error.
        content: the file.
        size: edge in pixels.
        how: what is done to images of another size or mode.

    Raises:
        CorruptImageError: the file is broken or no image.
        ImageError: it is not of the size or mode asked for.
    """
    Image = import_extra("PIL.Image", "vision", "Images are decoded by Pillow")  # noqa: N806  # its own name
    try:
        with Image.open(io.BytesIO(content)) as file:
            file.load()
            image = file.copy()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise CorruptImageError(
            f"{name} cannot be decoded ({type(error).__name__}): expected an image. Replace or remove it, or set "
            "skip_corrupt=True to go on without it."
        ) from error
    if image.mode != "RGB":
        if not how.convert:
            raise ImageError(f"{name} has mode {image.mode}: expected RGB. Set convert=True to convert such images.")
        image = image.convert("RGB")
    if image.size != (size, size) or (how.resize and how.crop_padding):
        if not how.resize:
            raise ImageError(
                f"{name} has {image.width}x{image.height} pixels: expected {size}x{size}. Set size=..., or resize=True to "
                "cut out the middle and resize it."
            )
        edge = max(size * min(image.size) // (size + how.crop_padding), 1)
        left, top = (image.width - edge) // 2, (image.height - edge) // 2
        image = image.crop((left, top, left + edge, top + edge))
        if not how.antialias:
            return bicubic_without_antialias(np.asarray(image, dtype=np.uint8), size)
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, dtype=np.uint8)


def bicubic_without_antialias(image: Images, size: int) -> Images:
    """Resize a square ``(edge, edge, 3)``: each new pixel is Keys' cubic through the 4x4 pixels around its centre.

    Pixels beyond the edge count nothing, and the weights of the others are made to add up to one. Rounded to uint8 at the end.

    Source: R. G. Keys 1981, *Cubic convolution interpolation for digital image processing*, equation 15 (a = −1/2), which
    ``tf.image.resize(method="bicubic", antialias=False)`` computes in float.
    """
    edge = len(image)
    centres = (np.arange(size) + 0.5) * edge / size - 0.5
    first = np.floor(centres).astype(np.int64) - 1
    places = first[:, None] + np.arange(4)
    distance = np.abs(centres[:, None] - places)
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance <= 1, near, np.where(distance < 2, far, 0)) * ((places >= 0) & (places < edge))
    matrix = np.zeros((size, edge))
    np.add.at(matrix, (np.arange(size)[:, None], places.clip(0, edge - 1)), weights / weights.sum(1, keepdims=True))
    resized = np.einsum("ah,bw,hwc->abc", matrix, matrix, image, optimize=True)
    pixels: Images = np.clip(np.rint(resized), 0, 255).astype(np.uint8)
    return pixels


def _clean(name: str) -> str:
    return name.removeprefix("./")


def _locate(root: Path) -> Path:
    places = [root] if root.is_absolute() else [root, Path(os.environ.get(VARIABLE, BESIDE)) / root]
    for place in places:
        if place.exists():
            return place
    raise DataError(
        f"root={str(root)!r}: found neither {' nor '.join(str(place) for place in places)}: expected a folder of images or "
        f"an archive. Give its path, or the folder it lies in as the environment variable {VARIABLE}."
    )
