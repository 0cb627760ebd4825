"""Fixed features: computed once, of each image alone, and refused when they are not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_dp.data import DataError, FixedFeatures
from lightning_dp.data.images import ImageArray, ImageDataModule


class FewImages(ImageDataModule):
    """Random images in memory, the validation set used for testing as well."""

    def __init__(self, seed: int = 0, mean: tuple[float, float, float] = (0.5, 0.5, 0.5)) -> None:
        super().__init__(batch_size=4, val_batch_size=4, num_workers=0, mean=mean, std=(1.0, 1.0, 1.0))
        self.random = np.random.default_rng(seed)

    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        train, val = (self.random.integers(0, 256, (n, 4, 4, 3), dtype=np.uint8) for n in (45, 6))
        held = ImageArray(val, np.arange(6) % 2)
        return ImageArray(train, np.arange(45) % 2), held, held


class Doubled(nn.Module):
    def __init__(self, by: float = 2.0) -> None:
        super().__init__()
        self.by, self.seen = by, 0

    def forward(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        return self.by * images.mean(1, keepdim=True)


class Mixes(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images - images.mean(0)


def features(folder: Path, network: nn.Module | None = None, **options: Any) -> FixedFeatures:
    return FixedFeatures(FewImages(**options), network or Doubled(), batch_size=5, cache_dir=folder)


def test_each_example_has_the_features_of_its_normalised_image(tmp_path: Path) -> None:
    module = features(tmp_path)
    module.prepare_data()
    module.setup()
    images = module.images.train_set.images.double() / 255 - 0.5
    found = torch.stack([x for x, _ in module.train_set])
    torch.testing.assert_close(found.double(), 2 * images.mean(1, keepdim=True), rtol=1e-3, atol=1e-3)
    assert [y for _, y in module.train_set] == [y for _, y in module.images.train_set]
    assert module.test_set is module.val_set
    batch = next(iter(module.val_dataloader()))
    assert batch[0].dtype == torch.float16
    assert module.on_after_batch_transfer(batch, 0)[0].dtype == torch.float32


def test_the_second_time_they_are_read_and_other_ones_are_not_taken_for_them(tmp_path: Path) -> None:
    features(tmp_path).setup()
    files = set(tmp_path.iterdir())
    assert len(files) == 2
    again = Doubled()
    features(tmp_path, again).setup()
    assert again.seen == 2 * 8, "only what tells features apart: four images together and one by one, of each set"
    assert set(tmp_path.iterdir()) == files
    for other in (
        features(tmp_path, Doubled(3.0)),
        features(tmp_path, seed=1),
        features(tmp_path, mean=(0.4, 0.5, 0.5)),
    ):
        before = len(list(tmp_path.iterdir()))
        other.setup()
        assert len(list(tmp_path.iterdir())) == before + 2


def test_what_would_not_be_private_or_fixed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"features=Mixes gives an image other features when it is among others"):
        features(tmp_path, Mixes()).setup()
    with pytest.raises(DataError, match=r"features=Conv2d has parameters to train \(weight, bias\)"):
        features(tmp_path, nn.Conv2d(3, 1, 1)).setup()
    with pytest.raises(DataError, match=r"not finite in float16 for images 0 to 3: expected at most 65504"):
        features(tmp_path, Doubled(1e6)).setup()
    assert not list(tmp_path.iterdir()), "nothing unfinished is left behind"
    large = features(tmp_path)
    large.images.load = lambda: (TensorDataset(torch.zeros(4, 3, 4, 4)),) * 3  # type: ignore[method-assign]  # a stand-in
    with pytest.raises(DataError, match=r"images of type TensorDataset: expected images held in memory"):
        large.setup()
    with pytest.raises(ValueError, match=r"batch_size=0: expected at least 1"):
        FixedFeatures(FewImages(), Doubled(), batch_size=0)
