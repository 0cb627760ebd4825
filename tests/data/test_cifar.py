"""CIFAR from torchvision: splits, normalisation on the device, and what is said when the data are not there."""

from __future__ import annotations

from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchvision import datasets

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy
from lightning_dp.data import CIFARDataModule, DataError
from lightning_dp.models import ImageClassifier, WideResNet
from tests.conftest import trainer


class Small:
    """What torchvision's CIFAR datasets look like, with 60 training and 20 test images made here."""

    def __init__(self, root: str, train: bool, download: bool) -> None:
        rng = np.random.default_rng(train)
        count = 60 if train else 20
        self.data = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = (np.arange(count) % 10).tolist()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "CIFAR10", Small)
    monkeypatch.setattr(datasets, "CIFAR100", Small)


def ready(**options: Any) -> CIFARDataModule:
    module = CIFARDataModule(batch_size=16, **options)
    module.prepare_data()
    module.setup("fit")
    return module


def test_final_runs_train_on_everything_and_validate_on_the_test_images(small: None) -> None:
    data = ready()
    assert (len(data.train_set), len(data.val_set)) == (60, 20)
    assert data.val_set is data.test_set


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_held_out_images_are_the_last_ones_and_are_not_trained_on(small: None, name: Any) -> None:
    data, whole = ready(name=name, held_out=7), Small("", train=True, download=False)
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (53, 7, 20)
    images = torch.cat([data.train_set.images, data.val_set.images])
    assert torch.equal(images, torch.from_numpy(whole.data).permute(0, 3, 1, 2))
    assert data.train_set.labels + data.val_set.labels == whole.targets


def test_images_travel_as_bytes_and_arrive_normalised(small: None) -> None:
    data = ready()
    images, labels = next(iter(data.val_dataloader()))
    assert images.dtype == torch.uint8
    normalised, same = data.on_after_batch_transfer([images, labels], 0)
    assert torch.equal(same, labels)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (data.mean, data.std))
    torch.testing.assert_close(normalised * std + mean, images / 255, rtol=1e-5, atol=1e-6)
    assert data.on_after_batch_transfer((normalised, labels), 0)[0] is normalised


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_private_training_with_views_from_bytes_to_weights(small: None, precision: Any) -> None:
    seen: list[torch.Tensor] = []
    module = ImageClassifier(WideResNet(10, 1))
    module.on_validation_batch_start = lambda batch, batch_idx: seen.append(batch[0])
    private = DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=8)
    data = CIFARDataModule(batch_size=8, val_batch_size=20)
    trainer(private, AugmentationMultiplicity(k=2), max_steps=2, precision=precision).fit(module, datamodule=data)
    assert seen, "validation has run"
    expected = data.on_after_batch_transfer((data.val_set.images, 0), 0)[0].to(seen[0].dtype)
    assert torch.equal(seen[0], expected), "validation images are normalised and not augmented"


def test_offline_says_where_to_put_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise URLError("no route to host")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", offline)
    with pytest.raises(
        DataError, match=r"cifar10 is not there and could not be downloaded \(URLError\).*put the archive"
    ):
        CIFARDataModule(root=tmp_path / "empty").prepare_data()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_or_broken_files(tmp_path: Any, name: Any) -> None:
    data = CIFARDataModule(name=name, root=tmp_path, download=False)
    data.prepare_data()
    with pytest.raises(DataError, match=rf"{name} is not there or its checksum is wrong: .*Set download=True"):
        data.setup()
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(b"broken")
    with pytest.raises(DataError, match="its checksum is wrong"):
        data.setup()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "cifar20"}, "^name='cifar20': expected one of cifar10, cifar100"),
        ({"held_out": -1}, "^held_out=-1: expected at least 0"),
        ({"val_batch_size": 0}, "^val_batch_size=0: expected at least 1"),
        ({"num_workers": -1}, "^num_workers=-1: expected at least 0"),
        ({"std": (1.0, 0.0, 1.0)}, r"^std=\(1.0, 0.0, 1.0\): expected numbers above 0"),
    ],
)
def test_bad_input(options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        CIFARDataModule(**options)


def test_holding_everything_out_is_refused(small: None) -> None:
    with pytest.raises(ValueError, match=r"^held_out=60: expected less than the 60 training images"):
        ready(held_out=60)
