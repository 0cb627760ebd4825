"""make_trainable_privately: no layer mixes examples any more, and what was learnt is still there."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy, PreflightError, make_trainable_privately
from lightning_dp.layers.batch_norm import mixes_examples
from lightning_dp.models.weight_standardisation import WSConv2d
from tests.conftest import Regressor, trainer, weights
from tests.engines.against_loop import agree
from tests.nearly import assert_nearly


def trained(layer: nn.Module, channels: int = 16) -> nn.Module:
    """A BatchNorm as after some training on data whose channels differ a lot."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        nn.init.uniform_(layer.weight, 0.5, 2.0)
        nn.init.uniform_(layer.bias, -1.0, 1.0)
        layer.running_mean.uniform_(-3.0, 3.0)
        layer.running_var.uniform_(0.2, 4.0)
        layer.num_batches_tracked.fill_(7)
    return layer


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_pretrained_statistics_are_folded(norm: Any) -> None:
    """On an image with the data's statistics the new layer gives what the old one gives in eval mode."""
    old = trained(nn.BatchNorm2d(16)).eval()
    noise = torch.randn(2, 16, 64, 64, generator=torch.Generator().manual_seed(1))
    noise = (noise - noise.mean((2, 3), keepdim=True)) / noise.std((2, 3), keepdim=True, unbiased=False)
    images = old.running_mean.view(-1, 1, 1) + old.running_var.sqrt().view(-1, 1, 1) * noise
    expected = old(images)
    holder = nn.Sequential(old)
    new = make_trainable_privately(holder, norm)[0]
    assert isinstance(new, nn.GroupNorm)
    assert new.num_groups == (4 if norm == "group" else 1)
    torch.testing.assert_close(new(images), expected, rtol=1e-4, atol=1e-4)


def test_an_untrained_layer_keeps_scale_and_shift() -> None:
    old = trained(nn.BatchNorm2d(16))
    old.num_batches_tracked.zero_()
    scale, shift = old.weight.clone(), old.bias.clone()
    new = make_trainable_privately(nn.Sequential(old))[0]
    assert_nearly(
        [new.weight.detach(), new.bias.detach()], [scale.detach(), shift.detach()], rtol=1e-5, atol=1e-6
    )  # float32


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "densenet121"])
def test_torchvision_models_mix_no_examples_afterwards(name: str) -> None:
    module = getattr(torchvision.models, name)(num_classes=3)
    names = [one for one, _ in module.named_parameters()]
    fixed = make_trainable_privately(module)
    assert fixed is module
    assert [one for one, _ in fixed.named_parameters()] == names
    assert not any(mixes_examples(layer) for layer in fixed.modules())
    fixed.eval()  # without dropout; no normalisation depends on the mode any more
    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        both, alone = fixed(images), fixed(images[:1])
    torch.testing.assert_close(both[:1], alone, rtol=1e-3, atol=1e-4)


class Classifier(Regressor):
    def __init__(self) -> None:
        super().__init__(lr=0.01)
        self.net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


def test_a_resnet_is_refused_with_every_layers_name_and_trains_when_the_advice_is_followed() -> None:
    data = TensorDataset(torch.randn(8, 3, 32, 32), torch.arange(8) % 3)
    module = Classifier()
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    with pytest.raises(PreflightError, match=r"make_trainable_privately\(module\)") as caught:
        trainer(DifferentialPrivacy(noise_multiplier=1.0)).fit(module, DataLoader(data, batch_size=4))
    assert len(names) == 12
    assert all(name in str(caught.value) for name in names)
    before = weights(make_trainable_privately(module)).clone()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, DataLoader(data, batch_size=4))
    assert not torch.equal(before, weights(module))


def test_what_stays_and_what_a_shared_layer_becomes() -> None:
    frozen = nn.BatchNorm2d(8).requires_grad_(False).eval()
    shared = nn.BatchNorm2d(8)
    module = nn.Sequential(frozen, shared, nn.ReLU(), shared, nn.LayerNorm(8))
    make_trainable_privately(module)
    assert module[0] is frozen
    assert module[1] is module[3]
    assert isinstance(module[1], nn.GroupNorm)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.BatchNorm1d(32), (4, 32)), (nn.BatchNorm1d(32), (4, 32, 5)), (nn.BatchNorm2d(32, affine=False), (4, 32, 1, 1)),
     (nn.BatchNorm3d(6), (4, 6, 2, 2, 2)), (nn.InstanceNorm2d(6, affine=True, track_running_stats=True), (4, 6, 4, 4))],
)  # fmt: skip
def test_every_kind_of_layer_still_tells_inputs_apart(layer: nn.Module, shape: tuple[int, ...]) -> None:
    new = make_trainable_privately(layer)
    assert not mixes_examples(new)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    output = new(inputs).detach()
    assert output.shape == inputs.shape
    assert float(output.flatten(1).std(1).min()) > 0.1  # a group of one feature would give zero everywhere
    torch.testing.assert_close(new(inputs[:1]).detach(), output[:1])


class _WithActivation(nn.BatchNorm2d):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).relu()


@pytest.mark.parametrize("layer", [_WithActivation(8), nn.LazyBatchNorm2d()])
def test_a_layer_that_does_more_is_not_guessed_at(layer: nn.Module) -> None:
    with pytest.raises(PreflightError, match=r"^0 is a .*expected one of torch's own.*norm_layer"):
        make_trainable_privately(nn.Sequential(layer))


@pytest.mark.parametrize(
    ("options", "words"),
    [({"norm": "batch"}, "norm='batch': expected one of group, layer"), ({"groups": 0}, "groups=0: expected at least 1"),
     ({"groups": 3}, "groups=3 for the 8 channels of 0: expected a divisor")],
)  # fmt: skip
def test_arguments_out_of_range(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        make_trainable_privately(nn.Sequential(nn.BatchNorm2d(8)), **options)
    assert words in str(caught.value)


def resnet() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)


def test_a_resnets_standardised_weights_are_those_of_the_recipes_and_book_keeping_equals_the_loop() -> None:
    module = make_trainable_privately(resnet(), weight_standardisation=True).double()
    convolution = module.layer1[0].conv1
    twin = WSConv2d(64, 64, 3, padding=1).double()
    twin.weight.data, twin.gain.data = (
        convolution.parametrizations.weight.original.data,
        convolution.parametrizations.weight[0].gain.data,
    )
    assert_nearly(convolution.weight.detach(), twin.standardised_weight().detach())
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    engine = agree(module, images)
    assert set(engine.handled.values()) == {"ParametrizedConv2d, from within", "GroupNorm", "Linear"}


def test_standardised_weights_start_as_those_that_were_there_without_their_means() -> None:
    zero = nn.init.zeros_(nn.Conv2d(3, 4, 3).weight)
    for layer in (nn.Conv1d(4, 6, 3), nn.Conv2d(4, 8, 3, groups=2), nn.Conv3d(2, 4, 2)):
        module = nn.Sequential(layer)
        before = layer.weight.detach().clone()
        make_trainable_privately(module, weight_standardisation=True)
        centred = before - before.flatten(1).mean(1).view(-1, *[1] * (before.ndim - 1))
        torch.testing.assert_close(layer.weight, centred)
        assert torch.equal(layer.parametrizations.weight.original, before)
        parametrize.remove_parametrizations(layer, "weight")
        torch.testing.assert_close(layer.weight, centred)
        assert set(module.state_dict()) == {"0.weight", "0.bias"}
    layer = nn.Conv2d(3, 4, 3)
    layer.weight.data = zero.data
    make_trainable_privately(layer, weight_standardisation=True)
    layer(torch.randn(1, 3, 3, 3)).sum().backward()
    assert layer.parametrizations.weight.original.grad.abs().max() > 0  # a layer that starts closed can open


def test_which_convolutions_are_standardised() -> None:
    frozen = nn.Conv2d(8, 8, 3).requires_grad_(False)
    alone = nn.Conv2d(8, 8, 1, groups=8)  # a weight per channel: nothing would be left of it
    shared = nn.Conv2d(8, 8, 3)
    module = nn.Sequential(frozen, alone, shared, nn.ConvTranspose2d(8, 8, 3), shared, nn.Linear(3, 3))
    for _ in range(2):  # once more changes nothing
        make_trainable_privately(module, weight_standardisation=True)
        names = [name for name, _ in module.named_parameters() if "parametrizations" in name]
        assert names == ["2.parametrizations.weight.original", "2.parametrizations.weight.0.gain"]
    assert len(shared.parametrizations.weight) == 1


@pytest.mark.parametrize(
    "layer", [nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.LazyConv2d(4, 3)]
)  # fmt: skip
def test_weights_that_are_computed_or_not_there_are_not_standardised(layer: nn.Module) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    with pytest.raises(PreflightError, match=r"weight_standardisation=True, yet 1 has no plain weight: expected"):
        make_trainable_privately(module, weight_standardisation=True)
    assert not parametrize.is_parametrized(module[0])  # nothing is half done


class _ThenParts(nn.BatchNorm2d):
    """As timm has them: one layer that normalises, drops and activates."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Dropout(0.5), nn.SiLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(images)))


def test_a_layer_with_an_activation_inside_keeps_it() -> None:
    plain, old = trained(nn.BatchNorm2d(16)), _ThenParts(16)
    old.load_state_dict(plain.state_dict())
    names = [name for name, _ in old.named_modules()]
    new = make_trainable_privately(nn.Sequential(old))[0].eval()
    assert isinstance(new, nn.GroupNorm)
    assert [name for name, _ in new.named_modules()] == names
    images = torch.randn(3, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.silu(make_trainable_privately(nn.Sequential(plain))(images))
    torch.testing.assert_close(new(images), expected)
    assert new.train().drop.training


def test_an_efficientnet_of_timm_trains_afterwards_as_the_loop_trains_it() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = make_trainable_privately(timm.create_model("test_efficientnet", num_classes=3)).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    agree(network, images)


class _InAnotherOrder(_ThenParts):
    def forward(self, images: Tensor) -> Tensor:
        return self.drop(nn.BatchNorm2d.forward(self, self.act(images)))


def test_parts_that_come_before_are_not_put_after() -> None:
    with pytest.raises(PreflightError, match="a BatchNorm and then its own parts"):
        make_trainable_privately(nn.Sequential(_InAnotherOrder(8)))
