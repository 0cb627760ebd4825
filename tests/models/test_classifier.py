"""ImageClassifier: what it trains, with what, and that privacy and plain Lightning both work on it."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.models import ImageClassifier, WideResNet
from tests.conftest import trainer


def blobs(examples: int = 64, classes: int = 4) -> TensorDataset:
    """One 8x8 image per class plus a little noise."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(examples) % classes
    centres = torch.randn(classes, 3, 8, 8, generator=generator)
    return TensorDataset(centres[labels] + 0.1 * torch.randn(examples, 3, 8, 8, generator=generator), labels)


def classifier(**options: Any) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(WideResNet(10, 1, num_classes=4), num_classes=4, **options)


@pytest.mark.parametrize("private", [False, True])
def test_it_learns_with_and_without_privacy(private: bool) -> None:
    module = classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    callbacks = [DifferentialPrivacy(noise_multiplier=0.1, clip_norm=1.0)] if private else []
    fitter = trainer(*callbacks, max_steps=30)
    fitter.fit(module, DataLoader(blobs(), batch_size=32, shuffle=True), DataLoader(blobs(), batch_size=64))
    logged = fitter.callback_metrics
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(logged)
    assert logged["val/accuracy"] > 0.9
    (tested,) = fitter.test(module, DataLoader(blobs(), batch_size=64), verbose=False)
    assert tested["test/accuracy"] > 0.9
    (predicted,) = L.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False).predict(
        module, DataLoader(blobs(8), batch_size=8)
    )
    assert predicted.shape == (8,)


@pytest.mark.parametrize(
    ("train", "expected"),
    [
        ("all", lambda name: True),
        ("last_layer", lambda name: name.startswith("classifier.")),
        ("stages.2.*", lambda name: name.startswith("stages.2.")),
        ("*.gain, classifier.*", lambda name: name.endswith(".gain") or name.startswith("classifier.")),
    ],
)
@pytest.mark.parametrize("private", [False, True])
def test_exactly_what_is_named_is_trained(train: str, expected: Any, private: bool) -> None:
    module = classifier(train=train, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    callbacks = [DifferentialPrivacy(noise_multiplier=1.0)] if private else []
    trainer(*callbacks, max_steps=2).fit(module, DataLoader(blobs(), batch_size=16))
    moved = {name for name, p in module.network.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if expected(name)}


def test_a_pattern_that_matches_nothing_is_an_error_with_examples_of_names() -> None:
    with pytest.raises(
        ValueError, match=r"^train='head.\*': 'head.\*' matches no parameter; expected.*first_conv.weight"
    ):
        classifier(train="head.*")


def test_default_optimizer_is_plain_sgd() -> None:
    optimizer = classifier().configure_optimizers()
    assert type(optimizer) is torch.optim.SGD
    assert (optimizer.defaults["momentum"], optimizer.defaults["weight_decay"]) == (0, 0)


@pytest.mark.parametrize("private", [False, True])
def test_the_scheduler_steps_once_for_each_update(private: bool) -> None:
    module = classifier(
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0),
        lr_scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, step_size=1, gamma=0.5),
    )
    callbacks = [DifferentialPrivacy(noise_multiplier=1.0)] if private else []
    fitter = trainer(*callbacks, max_steps=3)
    fitter.fit(module, DataLoader(blobs(), batch_size=16))
    assert fitter.optimizers[0].param_groups[0]["lr"] == 1 / 8


def test_any_network_will_do() -> None:
    module = ImageClassifier(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), num_classes=4, train="last_layer")
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(module, DataLoader(blobs(), batch_size=16))


def test_channels_last_is_another_order_in_memory_and_the_same_training() -> None:
    ends = []
    for last in (False, True):
        module = classifier(optimizer=lambda p: torch.optim.SGD(p, lr=0.5), channels_last=last)
        fitter = trainer(DifferentialPrivacy(noise_multiplier=0.5, clip_norm=1.0, seed=3), max_steps=3)
        fitter.fit(module, DataLoader(blobs(), batch_size=16))
        kernel = next(p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert kernel.is_contiguous(memory_format=torch.channels_last) == last
        ends.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    torch.testing.assert_close(ends[1], ends[0], rtol=0, atol=1e-4)
