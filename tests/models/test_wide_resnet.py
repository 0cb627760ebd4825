"""WideResNet: the paper's network, against a second implementation in plain functions, and its signals at the start."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.models import WideResNet, WSConv2d


@pytest.mark.parametrize(
    ("depth", "width", "classes", "parameters"),
    [(16, 4, 10, 2_753_818), (40, 4, 10, 8_961_306), (28, 10, 10, 36_500_378), (28, 10, 100, 36_558_068)],
)
def test_parameter_counts_are_the_papers(depth, width, classes, parameters):
    with torch.device("meta"):
        network = WideResNet(depth, width, classes)
    assert sum(p.numel() for p in network.parameters()) == parameters


# The second implementation: plain functions on a flat list of parameters in the order of the data.


def standardise(w: Tensor, gain: Tensor) -> Tensor:
    rows = w.flatten(1)
    mean = rows.mean(1, keepdim=True)
    variance = ((rows - mean) ** 2).sum(1, keepdim=True) / rows.shape[1]
    floor = torch.full_like(variance, 1e-4)
    return ((rows - mean) * gain[:, None] / torch.maximum(variance * rows.shape[1], floor).sqrt()).reshape(w.shape)


def group_norm(x: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    b, c, h, w = x.shape
    grouped = x.reshape(b, 16, -1)
    mean = grouped.mean(2, keepdim=True)
    variance = (grouped**2).mean(2, keepdim=True) - mean**2
    normal = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(b, c, h, w)
    return normal * scale[None, :, None, None] + offset[None, :, None, None]


def plain_wide_resnet(weights: dict[str, Tensor], images: Tensor, depth: int) -> Tensor:
    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = standardise(weights[f"{name}.weight"], weights[f"{name}.gain"])
        reach = kernel.shape[-1] // 2
        return F.conv2d(F.pad(x, (reach,) * 4), kernel, weights[f"{name}.bias"], stride)

    def act(x: Tensor, name: str) -> Tensor:
        return group_norm(x.clamp(min=0), weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])

    x = conv(images, "first_conv")
    for stage in range(3):
        for block in range((depth - 4) // 6):
            name, stride = f"stages.{stage}.{block}", 2 if stage and not block else 1
            skip = conv(act(x, f"{name}.shortcut.0"), f"{name}.shortcut.1", stride) if block == 0 else x
            branch = conv(act(x, f"{name}.residual.0"), f"{name}.residual.1", stride)
            x = skip + conv(act(branch, f"{name}.residual.2"), f"{name}.residual.3")
    pooled = act(x, "final").flatten(2).mean(2)
    return pooled @ weights["classifier.weight"].T + weights["classifier.bias"]


@pytest.mark.parametrize(("depth", "width"), [(10, 1), (16, 2)])
def test_forward_is_that_of_plain_functions(depth, width):
    torch.manual_seed(0)
    network = WideResNet(depth, width)
    for parameter in network.parameters():  # gains, biases and norms away from ones and zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    images = torch.randn(3, 3, 32, 32)
    expected = plain_wide_resnet(dict(network.named_parameters()), images, depth)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)


def outputs_of(network: nn.Module, kind: type[nn.Module], images: Tensor) -> list[Tensor]:
    seen: list[Tensor] = []
    hooks = [m.register_forward_hook(lambda *a: seen.append(a[2])) for m in network.modules() if isinstance(m, kind)]
    with torch.no_grad():
        network(images)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("depth", [16, 40])
def test_signals_neither_grow_nor_fade_with_depth(depth):
    """Variance of every convolution's output within a factor of two, from the first layer to the last."""
    torch.manual_seed(0)
    variances = [float(out.var()) for out in outputs_of(WideResNet(depth, 4), WSConv2d, torch.randn(4, 3, 32, 32))]
    assert len(variances) == depth  # depth - 4 in the branches, the first one and three shortcuts
    assert max(variances) < 2 * min(variances)


def test_without_weight_standardisation_scale_of_the_weights_matters_and_with_it_it_does_not():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    moved = {}
    for standardised in (True, False):
        torch.manual_seed(0)
        network = WideResNet(10, 1, weight_standardisation=standardised, norm="none")
        before = network(images)
        with torch.no_grad():
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.weight.mul_(3).add_(0.5)
        moved[standardised] = float((network(images) - before).detach().abs().max())
    assert moved[True] < 1e-4
    assert moved[False] > 1


@pytest.mark.parametrize("engine_options", [{}, {"weight_standardisation": False}, {"order": "norm_relu"}])
def test_private_gradient_under_vmap_is_the_loops(engine_options):
    torch.manual_seed(0)
    network = WideResNet(10, 1, **engine_options).double()
    batch = (torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 0, 7]))

    def loss(parameters, example):
        images, labels = example
        return F.cross_entropy(functional_call(network, dict(parameters), (images,)), labels), ()

    parameters = dict(network.named_parameters())
    by_vmap = VmapEngine().clipped_sum(loss, parameters, batch, 3, 0.5)
    by_loop = LoopEngine().clipped_sum(loss, parameters, batch, 3, 0.5)
    torch.testing.assert_close(by_vmap.norms, by_loop.norms)
    assert bool((by_vmap.norms > 0.5).all()), "clipping must have something to do"
    for name in parameters:
        torch.testing.assert_close(by_vmap.gradient[name], by_loop.gradient[name], rtol=1e-8, atol=1e-12)


def test_an_image_changes_no_other_images_logits():
    network, images = WideResNet(10, 1), torch.randn(3, 3, 32, 32)
    changed = images.clone()
    changed[0] = torch.randn(3, 32, 32)
    torch.testing.assert_close(network(images)[1:], network(changed)[1:])


def test_initialisation_has_the_stated_spreads():
    torch.manual_seed(0)
    network = WideResNet(16, 4)
    for module in network.modules():
        if isinstance(module, WSConv2d):
            fan_in = module.weight[0].numel()
            assert float(module.weight.detach().std()) * fan_in**0.5 == pytest.approx(1, abs=0.15)
            assert torch.equal(module.gain, torch.ones_like(module.gain))
            assert not module.bias.any()
    weight = network.classifier.weight.detach()
    assert float(weight.std()) * weight.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)
    assert float(weight.abs().max()) * weight.shape[1] ** 0.5 <= 2 / 0.8796
    assert not network.classifier.bias.any()


def test_same_padding_adds_its_zeros_after():
    """What TensorFlow's SAME does at stride 2 on even sizes: the window of output (i, j) starts at pixel (2i, 2j)."""
    torch.manual_seed(0)
    for same in (True, False):
        network = WideResNet(10, 1, same_padding=same)
        residual = network.stages[1][0].residual
        image = torch.randn(1, 16, 8, 8)
        layer = residual[1][1] if same else residual[1]
        offset = 0 if same else -1
        padded = F.pad(image, (1, 2, 1, 2))
        window = padded[0, :, 2 + offset + 1 : 5 + offset + 1, 4 + offset + 1 : 7 + offset + 1]
        expected = (layer.standardised_weight() * window).sum((1, 2, 3)) + layer.bias
        torch.testing.assert_close(residual[1](image)[0, :, 1, 2], expected, rtol=1e-4, atol=1e-5)
    assert WideResNet(10, 1, same_padding=True)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"depth": 18}, r"^depth=18: expected 6 n \+ 4"),
        ({"depth": 4}, r"^depth=4: expected 6 n \+ 4"),
        ({"width": 0}, "^width=0: expected at least 1"),
        ({"norm": "batch"}, "^norm='batch': expected one of group, none. Batch norm mixes the examples"),
        ({"norm": "layer"}, "^norm='layer': expected one of group, none.$"),
        ({"order": "conv_first"}, "^order='conv_first': expected one of relu_norm, norm_relu"),
        ({"groups": 5}, "^groups=5: expected a divisor of 16"),
    ],
)
def test_bad_input(options, text):
    with pytest.raises(ValueError, match=text):
        WideResNet(**options)
