"""Folders and archives of images: splits, the cache, and every way in which they can be wrong."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dp.data import DataError, ImageFolderDataModule
from lightning_dp.data.files import (
    CorruptImageError,
    Decoding,
    ImageError,
    ImageFiles,
    bicubic_without_antialias,
    decode,
)
from lightning_dp.data.images import hold_out_evenly

CLASSES = ("ant", "bee", "cat")
EDGE = 8


def colour(split: str, label: int, i: int) -> np.ndarray[Any, Any]:
    """An image that tells which it is."""
    image = np.zeros((EDGE, EDGE, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 40 * label, 10 * i, 255 * (split == "train")
    return image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for split, count in (("train", 6), ("val", 2)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(colour(split, label, i)).save(root / split / name / f"{i}.png")
    (root / "train" / "ant" / "notes.txt").write_text("not an image")
    return root


def data(root: Path, tmp_path: Path, **options: Any) -> ImageFolderDataModule:
    given = {"num_classes": 3, "size": EDGE, "cache_dir": tmp_path / "cache", "batch_size": 4, "val_batch_size": 4}
    return ImageFolderDataModule(root, **{**given, **options})


def ready(*args: Any, **options: Any) -> ImageFolderDataModule:
    module = data(*args, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def items(dataset: Any) -> list[tuple[list[int], int]]:
    return [(dataset[i][0][:, 0, 0].tolist(), int(dataset[i][1])) for i in range(len(dataset))]


EXPECTED = {
    split: [([40 * label, 10 * i, 255 * (split == "train")], label) for label in range(3) for i in range(count)]
    for split, count in (("train", 6), ("val", 2))
}


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_and_labels_in_the_order_of_classes_and_names(folder: Path, tmp_path: Path, in_memory: bool) -> None:
    module = ready(folder, tmp_path, in_memory=in_memory)
    assert items(module.train_set) == EXPECTED["train"]
    assert items(module.val_set) == items(module.test_set) == EXPECTED["val"]
    assert module.train_set[0][0].dtype == torch.uint8


@pytest.mark.parametrize("kind", ["tar", "tar.xz"])
def test_an_archive_is_the_folder(folder: Path, tmp_path: Path, kind: str) -> None:
    archive = tmp_path / f"images.{kind}"
    with tarfile.open(archive, "w:xz" if kind == "tar.xz" else "w") as file:
        file.add(folder, arcname=".")
    assert items(ready(archive, tmp_path).train_set) == EXPECTED["train"]
    with pytest.raises(DataError, match="is an archive and in_memory is False: expected a folder"):
        ready(archive, tmp_path, in_memory=False)


@pytest.mark.parametrize("in_memory", [True, False])
def test_held_out_images_are_validated_on_and_not_trained_on(folder: Path, tmp_path: Path, in_memory: bool) -> None:
    module = ready(folder, tmp_path, in_memory=in_memory, held_out=3)
    train, val = items(module.train_set), items(module.val_set)
    assert sorted(train + val) == sorted(EXPECTED["train"])
    assert [label for _, label in val] == [0, 1, 2], "one of each class"
    assert items(module.test_set) == EXPECTED["val"]


@pytest.mark.parametrize("count", [0, 1, 7, 29])
def test_holding_out_is_a_split_even_over_the_classes(count: int) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 30)
    train, held_out = hold_out_evenly(labels, count)
    assert sorted([*train, *held_out]) == list(range(30))
    assert len(held_out) == count
    share = np.bincount(labels[held_out], minlength=3) - np.bincount(labels, minlength=3) * count / 30
    assert np.abs(share).max() <= 1
    assert all(np.array_equal(a, b) for a, b in zip(hold_out_evenly(labels, count), (train, held_out), strict=True))


def test_small_images_are_decoded_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready(folder, tmp_path)

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr("lightning_dp.data.folder.decode", fail)
    assert items(ready(folder, tmp_path).train_set) == EXPECTED["train"]


def test_the_cache_knows_when_the_images_or_the_settings_are_others(folder: Path, tmp_path: Path) -> None:
    ready(folder, tmp_path)
    assert ready(folder, tmp_path, size=4, resize=True).train_set.images.shape[-1] == 4
    os.remove(folder / "train" / "ant" / "0.png")
    assert items(ready(folder, tmp_path).train_set) == EXPECTED["train"][1:]
    path = folder / "train" / "ant" / "1.png"
    before = path.stat().st_mtime_ns
    Image.fromarray(np.full((EDGE, EDGE, 3), 7, dtype=np.uint8)).save(path)
    os.utime(path, ns=(before + 1_000, before + 1_000))
    assert items(ready(folder, tmp_path).train_set)[0] == ([7, 7, 7], 0)


def test_training_images_may_be_larger_for_random_crops(folder: Path, tmp_path: Path) -> None:
    module = ready(folder, tmp_path, size=4, train_size=6, resize=True, in_memory=False, held_out=2)
    assert [d[0][0].shape[-1] for d in (module.train_set, module.val_set, module.test_set)] == [6, 4, 4]


def test_the_middle_is_cut_out_before_resizing(tmp_path: Path, folder: Path) -> None:
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = 200
    Image.fromarray(wide).save(folder / "train" / "ant" / "0.png")
    image = ready(folder, tmp_path, resize=True, size=5).train_set[0][0]
    assert bool((image == 200).all())


def test_the_square_of_the_papers_release_is_cut_before_resizing() -> None:
    """Of an image of 300 x 400 pixels, 268 / 300 of the short side: columns 66 to 333, rows 16 to 283."""
    image = np.zeros((300, 400, 3), dtype=np.uint8)
    image[16:284, 66:334] = 200
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    for antialias in (True, False):
        found = decode("a", file.getvalue(), 268, Decoding(resize=True, crop_padding=32, antialias=antialias))
        assert found.shape == (268, 268, 3)
        assert (found == 200).all()
    assert not (decode("a", file.getvalue(), 300, Decoding(resize=True)) == 200).all()


def test_keys_cubic_through_the_nearest_pixels() -> None:
    """Exact for polynomials of the second degree away from the edge, at any ratio, and it averages over nothing."""
    at = np.arange(60.0)
    row = 0.05 * at**2 + at
    image = np.repeat(np.repeat(row[None, :, None], 60, 0), 3, 2)
    for size in (17, 60, 95):
        found = bicubic_without_antialias(image, size).astype(float)
        centres = (np.arange(size) + 0.5) * 60 / size - 0.5
        inner = (centres > 1) & (centres < 58)
        np.testing.assert_allclose(found[size // 2, inner, 0], (0.05 * centres**2 + centres)[inner], atol=0.5001)
    comb = np.zeros((60, 60, 3))
    comb[:, 1::3] = 240  # the middle pixel of every three: each of 20 new ones sees that pixel alone
    assert (bicubic_without_antialias(comb, 20)[:, 1:-1] == 240).all()


def test_caches_of_the_usual_decoding_keep_their_names() -> None:
    assert Decoding(True, False).key() == (True, False)
    assert Decoding(True, False, 32).key() != Decoding(True, False, 32, False).key() != Decoding(True, False).key()


def test_relative_roots_are_found_below_the_folder_of_the_environment(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIGHTNING_DP_DATA", str(folder.parent))
    monkeypatch.chdir("/")
    assert items(ready("images", tmp_path).train_set) == EXPECTED["train"]  # a path as a string
    with pytest.raises(DataError, match=r"^root='else': found neither else nor .*LIGHTNING_DP_DATA\.$"):
        ImageFiles("else")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"num_classes": 4},
            r"^num_classes=4: expected as many folders in .*train, which has 3 \(ant, bee, cat, \.\.\.\)",
        ),
        ({"train": "training"}, r"has no images training/<class>/<name>.*It holds train, val; name the folders with"),
        ({"held_out": 18}, "^held_out=18: expected at least 0 and less than the 18 training images"),
        ({"size": 0}, "^size=0: expected at least 1"),
        ({"resize": True, "crop_padding": -1}, "^crop_padding=-1: expected at least 0"),
        ({"antialias": False}, "^crop_padding=0, antialias=False: expected resize=True with them"),
        ({"batch_size": 0}, "^batch_size=0: expected at least 1"),
    ],
)
def test_bad_input(folder: Path, tmp_path: Path, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ready(folder, tmp_path, **options)


def test_other_classes_for_validation(folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "cat").rename(folder / "val" / "dog")
    with pytest.raises(DataError, match=r"have different classes \(cat, dog\): expected the same folders"):
        ready(folder, tmp_path)


def test_a_file_that_is_no_archive(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    with pytest.raises(DataError, match="is a file but no tar archive"):
        ImageFiles(tmp_path / "text")


@pytest.mark.parametrize("in_memory", [True, False])
def test_another_size_or_mode_is_an_error_that_names_the_image(folder: Path, tmp_path: Path, in_memory: bool) -> None:
    grey = folder / "train" / "bee" / "2.png"
    Image.fromarray(np.full((EDGE, EDGE), 90, dtype=np.uint8)).save(grey)
    with pytest.raises(ImageError, match=r"^train/bee/2.png has mode L: expected RGB. Set convert=True"):
        items(ready(folder, tmp_path, in_memory=in_memory).train_set)
    with pytest.raises(ImageError, match=r"^train/bee/2.png has mode L"):  # skipping is for broken images alone
        items(ready(folder, tmp_path, in_memory=in_memory, skip_corrupt=True).train_set)
    assert items(ready(folder, tmp_path, convert=True, in_memory=in_memory).train_set)[8] == ([90, 90, 90], 1)
    Image.fromarray(np.zeros((5, 9, 3), dtype=np.uint8)).save(grey)
    with pytest.raises(
        ImageError, match=r"^train/bee/2.png has 9x5 pixels: expected 8x8. Set size=\.\.\., or resize=True"
    ):
        items(ready(folder, tmp_path, in_memory=in_memory).train_set)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("content", [b"no image", b""])
def test_broken_images_are_named_and_skipped_only_if_asked(
    folder: Path, tmp_path: Path, in_memory: bool, content: bytes
) -> None:
    (folder / "train" / "bee" / "2.png").write_bytes(content)
    with pytest.raises(CorruptImageError, match=r"^train/bee/2.png cannot be decoded .* skip_corrupt=True"):
        items(ready(folder, tmp_path, in_memory=in_memory).train_set)
    for _ in range(2):  # the second time from the cache: it is said again
        with pytest.warns(
            UserWarning, match=r"^1 images of 'train' cannot be decoded and are left out: train/bee/2.png$"
        ):
            module = ready(folder, tmp_path, in_memory=in_memory, skip_corrupt=True)
        assert items(module.train_set) == EXPECTED["train"][:8] + EXPECTED["train"][9:]


def test_a_truncated_image_is_broken(folder: Path, tmp_path: Path) -> None:
    path = folder / "train" / "ant" / "3.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (EDGE, EDGE, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CorruptImageError, match=r"^train/ant/3.jpg cannot be decoded"):
        ready(folder, tmp_path)
