"""Fixed features: computed once, of each image alone, and refused when they are not."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.data import DataError, FixedFeatures
from lightning_dp.data.files import Decoding
from lightning_dp.data.folder import FolderImages
from lightning_dp.data.images import ImageArray, ImageDataModule, normalise
from lightning_dp.models import FrozenBody, ImageClassifier, WideResNet
from lightning_dp.models.public_weights import WeightsError
from tests.conftest import trainer


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
    large.images.load = lambda: (TensorDataset(torch.zeros(4, 3, 4, 4)),) * 3
    with pytest.raises(DataError, match=r"images of type TensorDataset: expected images held in memory or in files"):
        large.setup()
    with pytest.raises(ValueError, match=r"dtype='float64': expected one of 'float16', 'float32'"):
        FixedFeatures(FewImages(), Doubled(), dtype="float64")
    with pytest.raises(ValueError, match=r"batch_size=0: expected at least 1"):
        FixedFeatures(FewImages(), Doubled(), batch_size=0)


class Stopped(Doubled):
    """As a process that is killed after so many images, those that are looked at first included."""

    def __init__(self, after: int, by: float = 2.0) -> None:
        super().__init__(by)
        self.after = after

    def forward(self, images: Tensor) -> Tensor:
        if self.seen >= self.after:
            raise KeyboardInterrupt
        return super().forward(images)

    def _get_name(self) -> str:
        return "Doubled"


def test_what_was_stopped_goes_on_where_it_was_with_the_same_result(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, Stopped(8 + 20)).setup()
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part", "which nobody takes for features"
    features(tmp_path / "whole").setup()
    again = Doubled()
    module = features(tmp_path, again)
    module.setup()
    assert again.seen == 2 * 8 + (45 - 19) + 6, "one of the 20 images is seen again: its row may have been half written"
    assert not left.exists()
    for file in (tmp_path / "whole").iterdir():
        assert np.array_equal(np.load(tmp_path / file.name), np.load(file))


def test_what_others_left_behind_is_not_continued(tmp_path: Path) -> None:
    """It has the same name, of a network that prints the same and has the same weights, and other numbers."""
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, Stopped(8 + 20, by=3.0)).setup()
    again = Doubled()
    module = features(tmp_path, again)
    module.setup()
    assert again.seen == 2 * 8 + 45 + 6
    images = module.images.train_set.images.double() / 255 - 0.5
    found = torch.stack([x for x, _ in module.train_set])
    torch.testing.assert_close(found.double(), 2 * images.mean(1, keepdim=True), rtol=1e-3, atol=1e-3)


def test_a_file_that_is_no_array_is_begun_anew(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        features(tmp_path, Stopped(8 + 20)).setup()
    (left,) = tmp_path.iterdir()
    left.write_bytes(left.read_bytes()[:150])
    again = Doubled()
    features(tmp_path, again).setup()
    assert again.seen == 2 * 8 + 45 + 6


class Folder(ImageDataModule):
    """Six images in files, larger than those that are held in memory."""

    def __init__(self, root: Path) -> None:
        super().__init__(batch_size=4, val_batch_size=4, num_workers=0, mean=(0.5, 0.5, 0.5), std=(1.0, 1.0, 1.0))
        self.root = root
        root.mkdir(exist_ok=True)
        for index in range(6):
            if not (root / f"{index}.png").exists():
                pixels = np.random.default_rng(index).integers(0, 256, (72, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / f"{index}.png")

    def load(self) -> tuple[Dataset[Any], Dataset[Any], Dataset[Any]]:
        names = [f"{index}.png" for index in range(6)]
        images = FolderImages(self.root, names, [0, 1] * 3, 72, Decoding())
        return images, images, images


def test_images_in_files_are_seen_once_and_their_features_kept_to_the_bit(tmp_path: Path, caplog: Any) -> None:
    """Whatever their size; told from others by their files' names, sizes and times, and by the weights of the network."""

    def see(network: nn.Module) -> FixedFeatures:
        return FixedFeatures(Folder(tmp_path / "images"), network, val_batch_size=4, cache_dir=kept, dtype="float32")

    kept, network = tmp_path / "kept", Doubled()
    module = see(network)
    module.setup()
    assert network.seen == 2 * 8 + 6  # the two sets are one: told apart by eight each, computed once, and found
    assert any("That is private data: nothing protects it" in line for line in caplog.messages)
    (file,) = kept.iterdir()
    for index, (x, y) in enumerate(module.train_set):
        pixels, label = module.images.train_set[index]
        assert torch.equal(x, Doubled()(normalise(pixels.unsqueeze(0), (0.5, 0.5, 0.5), (1, 1, 1)))[0])
        assert (y, x.dtype) == (label, torch.float32)
    again = Doubled()
    see(again).setup()
    assert again.seen == 2 * 8
    assert list(kept.iterdir()) == [file]
    os.utime(tmp_path / "images" / "5.png", (1, 1))
    see(Doubled()).setup()
    assert len(list(kept.iterdir())) == 2


def test_training_on_kept_features_is_training_the_last_layer(tmp_path: Path) -> None:
    """The same draws, clipping and noise: each weight comes out the same, and the body is not run again."""
    torch.manual_seed(0)
    whole = ImageClassifier(WideResNet(10, 1, num_classes=2), 2, train="last_layer", optimizer=rate)
    body, head = FrozenBody(copy.deepcopy(whole.network)), copy.deepcopy(whole.network.get_submodule("classifier"))
    images = FewImages()
    images.setup()
    kept = FixedFeatures(images, body, batch_size=4, cache_dir=tmp_path, dtype="float32")
    alone = ImageClassifier(head, 2, optimizer=rate)
    for module, data in ((whole, images), (alone, kept)):
        private = DifferentialPrivacy(noise_multiplier=0.5, seed=1)
        trainer(private, max_steps=6, limit_val_batches=0).fit(module, datamodule=data)
    assert not isinstance(kept.features, FrozenBody), "let go"
    for name in ("weight", "bias"):
        trained = whole.network.get_parameter(f"classifier.{name}")
        torch.testing.assert_close(head.get_parameter(name), trained, rtol=0, atol=1e-5)
        assert not torch.equal(trained, torch.zeros_like(trained))


class Watched(FixedFeatures):
    """A subclass with a hook of its own, which nobody knows to treat each example by itself."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return super().on_after_batch_transfer(batch, dataloader_idx)


def renamed(hook: Any) -> Any:
    """A function that claims to be another, as every decorator makes it."""

    @functools.wraps(hook)
    def own(self: Any, batch: Any, dataloader_idx: int) -> Any:
        return hook(self, batch, dataloader_idx)

    return own


Wrapped = type("Wrapped", (FixedFeatures,), {"on_after_batch_transfer": renamed(FixedFeatures.on_after_batch_transfer)})


@pytest.mark.parametrize("kind", [FixedFeatures, Watched, Wrapped])
def test_features_go_together_and_a_hook_of_the_users_sees_one_example(
    kind: type[FixedFeatures], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is known is known by its code: neither a subclass nor a wrapper inherits the trust."""
    calls: list[Any] = []
    after: list[int] = []

    class Count(L.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            after.append(len(calls))

    def counted(trainer: Any) -> torch.dtype:
        calls.append(trainer)
        return torch.float32

    data = kind(FewImages(), Doubled(), batch_size=45, cache_dir=tmp_path)
    torch.manual_seed(0)
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), 2, optimizer=rate)
    monkeypatch.setattr("lightning_dp.data.features.type_of", counted)
    private = DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=45)
    trainer(private, Count(), max_steps=2, limit_val_batches=0).fit(module, datamodule=data)
    assert after[1] - after[0] == (1 if kind is FixedFeatures else 45)


def rate(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def test_a_frozen_body_stays_as_it_is() -> None:
    body = FrozenBody(WideResNet(10, 1, num_classes=2)).train()
    assert not any(part.training for part in body.modules())
    assert not any(p.requires_grad for p in body.parameters())
    with pytest.raises(WeightsError, match="no linear layer"):
        FrozenBody(nn.Sequential(nn.Flatten()))
