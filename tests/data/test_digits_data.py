"""The digits: sizes, split and scaling."""

import lightning as L
import pytest
import torch
from sklearn.datasets import load_digits

from lightning_dp.data import DigitsDataModule
from lightning_dp.data.digits import split_indices


@pytest.fixture(scope="module")
def data() -> DigitsDataModule:
    module = DigitsDataModule(batch_size=256)
    module.setup("fit")
    return module


def rows(dataset) -> list[tuple[float, ...]]:
    return [tuple(image.flatten().tolist()) for image in dataset.tensors[0]]


def test_sizes(data):
    assert (len(data.train_set), len(data.val_set)) == (1437, 360)


def test_items_are_float_images_and_integer_labels(data):
    for dataset in (data.train_set, data.val_set):
        image, label = dataset[0]
        assert image.shape == (1, 8, 8)
        assert image.dtype == torch.float32
        assert label.shape == ()
        assert label.dtype == torch.int64


def test_scaling_is_the_inverse_of_the_stated_formula(data):
    digits = load_digits()
    train, val = split_indices(digits.target)
    pixels = torch.from_numpy(digits.data).float()
    for dataset, indices in ((data.train_set, train), (data.val_set, val)):
        torch.testing.assert_close((dataset.tensors[0].flatten(1) + 1) * 8, pixels[indices], rtol=0, atol=1e-5)
        assert dataset.tensors[1].tolist() == digits.target[indices].tolist()
        assert dataset.tensors[0].abs().max() <= 1


def test_the_two_sets_are_disjoint_and_together_everything():
    train, val = split_indices(load_digits().target)
    assert sorted(train.tolist() + val.tolist()) == list(range(1797))


def test_no_validation_image_is_a_training_image(data):
    assert not set(rows(data.train_set)) & set(rows(data.val_set))


def test_every_class_gives_a_fifth_to_within_one():
    labels = torch.from_numpy(load_digits().target)
    _, val = split_indices(labels.numpy())
    given = torch.bincount(labels[val], minlength=10)
    assert torch.all((given - torch.bincount(labels) / 5).abs() < 1)


def test_no_seed_changes_the_split(data):
    L.seed_everything(7, verbose=False)
    other = DigitsDataModule()
    other.setup("validate")
    for mine, theirs in ((data.train_set, other.train_set), (data.val_set, other.val_set)):
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors, theirs.tensors, strict=True))


def test_training_batches_are_shuffled_and_cover_the_set(data):
    torch.manual_seed(0)
    batches = list(data.train_dataloader())
    labels = torch.cat([labels for _, labels in batches])
    assert [len(labels) for _, labels in batches] == [256] * 5 + [157]
    assert not torch.equal(labels, data.train_set.tensors[1])
    assert torch.equal(torch.bincount(labels), torch.bincount(data.train_set.tensors[1]))


@pytest.mark.parametrize("loader", ["val_dataloader", "test_dataloader", "predict_dataloader"])
def test_other_loaders_give_the_validation_digits_in_order(data, loader):
    labels = torch.cat([labels for _, labels in getattr(data, loader)()])
    assert torch.equal(labels, data.val_set.tensors[1])


@pytest.mark.parametrize("name", ["batch_size", "val_batch_size"])
def test_a_batch_size_below_one_is_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}=0: expected at least 1\."):
        DigitsDataModule(**{name: 0})
