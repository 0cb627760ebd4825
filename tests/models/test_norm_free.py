"""Norm-free networks of timm with the changes for differential privacy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.models import NormFreeNet
from lightning_dp.models.norm_free_layers import ScaledReLU


def test_nf_resnet_50_has_the_papers_number_of_parameters():
    with torch.device("meta"):
        network = NormFreeNet("nf_resnet50", num_classes=1000, stochastic_depth=0.1)
    assert sum(p.numel() for p in network.parameters()) == 25_557_048


@pytest.mark.parametrize("name", ["nf_resnet50", "dm_nfnet_f0", "dm_nfnet_f1", "dm_nfnet_f3"])
def test_skip_gains_are_ones_and_there_is_no_batch_norm(name):
    network = NormFreeNet(name, num_classes=5) if name in ("nf_resnet50", "dm_nfnet_f0") else on_meta(name)
    gains = [p for key, p in network.named_parameters() if key.endswith("skipinit_gain")]
    assert len(gains) == {"nf_resnet50": 16, "dm_nfnet_f0": 12, "dm_nfnet_f1": 24, "dm_nfnet_f3": 48}[name]
    if not gains[0].is_meta:
        assert all(float(gain.detach()) == 1 for gain in gains)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())
    classifier = network.net.get_submodule("head.fc")
    if not classifier.weight.is_meta:
        assert float(classifier.weight.detach().std()) == pytest.approx(0.01, rel=0.1)


def on_meta(name):
    with torch.device("meta"):
        return NormFreeNet(name, num_classes=5)


def variances(network, images):
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, output: seen.append(float(output.detach().var())))
        for stage in network.net.stages
        for block in stage
    ]
    network(images)
    for hook in hooks:
        hook.remove()
    return seen


def test_signals_stay_of_unit_size_in_nf_resnet_50():
    """Each block adds at most α² = 0.04 of variance, and each stage's first block starts again from one."""
    torch.manual_seed(0)
    network = NormFreeNet("nf_resnet50").eval()
    for variance in variances(network, torch.randn(2, 3, 96, 96)):
        assert 0.5 < variance < 2


@pytest.mark.parametrize(("name", "stochastic_depth"), [("test_nfnet", 0.0), ("test_nfnet", 0.5), ("nf_resnet26", 0.0)])
def test_per_example_gradients_under_vmap(name, stochastic_depth):
    torch.manual_seed(0)
    network = NormFreeNet(name, num_classes=4, stochastic_depth=stochastic_depth)
    batch = (torch.randn(2, 3, 32, 32), torch.tensor([0, 3]))

    def loss(parameters, example):
        images, labels = example
        return F.cross_entropy(functional_call(network, dict(parameters), (images,)), labels), ()

    parameters = dict(network.named_parameters())
    by_vmap = VmapEngine().clipped_sum(loss, parameters, batch, 2, 1.0)
    assert bool(torch.isfinite(by_vmap.norms).all())
    if stochastic_depth == 0:  # otherwise each engine draws its own masks
        by_loop = LoopEngine().clipped_sum(loss, parameters, batch, 2, 1.0)
        torch.testing.assert_close(by_vmap.norms, by_loop.norms, rtol=1e-4, atol=1e-6)
        for name in parameters:
            torch.testing.assert_close(by_vmap.gradient[name], by_loop.gradient[name], rtol=1e-3, atol=1e-5)


def test_scaled_relu_keeps_unit_variance_and_is_the_papers():
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert float(ScaledReLU()(x).var()) == pytest.approx(1, abs=0.02)
    assert ScaledReLU.gamma == pytest.approx((2 / (1 - 1 / torch.pi)) ** 0.5, rel=1e-3)


def test_branches_that_are_kept_are_not_scaled_up():
    network = NormFreeNet("test_nfnet", num_classes=4, stochastic_depth=0.5)
    paths = [m for m in network.modules() if hasattr(m, "scale_by_keep")]
    assert paths
    assert not any(path.scale_by_keep for path in paths)


def test_timms_own_form_is_there_for_its_weights():
    with torch.device("meta"):
        network = NormFreeNet("nf_resnet50", faithful=False)
    assert sum(p.numel() for p in network.parameters()) == 25_557_032


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "resnet50"}, "^name='resnet50': expected a norm-free model of timm"),
        ({"name": "nfnet_of_mine"}, "^name='nfnet_of_mine': expected a norm-free model of timm"),
        ({"name": "nf_resnet50", "stochastic_depth": 1.0}, r"^stochastic_depth=1.0: expected a share in \[0, 1\)"),
        ({"name": "nf_resnet50", "dropout": -0.1}, r"^dropout=-0.1: expected a share in \[0, 1\)"),
    ],
)
def test_bad_input(options, text):
    with pytest.raises(ValueError, match=text):
        NormFreeNet(**options)


def test_shortcuts_average_or_step() -> None:
    for average in (False, True):
        with torch.device("meta"):
            network = NormFreeNet("nf_resnet26", average_shortcuts=average)
        shortcut = network.net.get_submodule("stages.1.0.downsample")
        assert isinstance(shortcut.pool, nn.AvgPool2d) is average
        assert shortcut.conv.stride == ((1, 1) if average else (2, 2))
