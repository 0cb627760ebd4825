"""The paper's networks against the published formulas, written down independently in ``restated.py``: float64, 1e-10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.models import NormFreeNet, WideResNet
from lightning_dp.models.released_weights import PARAMETERS, haiku_names
from tests.models import restated

Network = TypeVar("Network", bound=nn.Module)


def shaken(network: Network) -> Network:
    """In float64, with every parameter moved from where it starts: gains that are all one would hide what they multiply."""
    network.double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=generator, dtype=torch.float64))
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return network


def names_of(network: WideResNet) -> dict[str, str]:
    """The authors' names, with torch's of a layer's parameters."""
    both = [(theirs.rpartition("/"), ours) for theirs, ours in haiku_names(network).items()]
    return {f"{layer}.{PARAMETERS[kind]}": ours for (layer, _, kind), ours in both}


def agree(
    network: nn.Module, names: dict[str, str], again: Callable[[Any, Tensor], Tensor], size: tuple[int, int]
) -> None:
    """Logits of two images, and every parameter's gradient."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([1, 3])
    parameters = dict(network.named_parameters())
    arrays = {theirs: parameters[ours].detach().clone().requires_grad_() for theirs, ours in names.items()}
    assert len(arrays) == len(parameters)
    logits, restated_logits = network(images), again(arrays, images)
    assert distance(logits, restated_logits) < 1e-10
    F.cross_entropy(logits, labels).backward()
    F.cross_entropy(restated_logits, labels).backward()
    for theirs, ours in names.items():
        expected, found = arrays[theirs].grad, parameters[ours].grad
        assert expected is not None
        assert found is not None
        assert float((expected - found).norm()) <= 1e-10 * max(float(expected.norm()), 1e-3), ours


def distance(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest number."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("size", [(32, 32), (21, 26)])
def test_wide_resnet(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    network = shaken(WideResNet(16, 1, num_classes=4, same_padding=True))
    agree(network, names_of(network), lambda arrays, images: restated.wide_resnet(arrays, images, 16), size)


def test_padding_on_either_side_is_another_network() -> None:
    torch.manual_seed(0)
    network = shaken(WideResNet(10, 1, num_classes=4, same_padding=False))
    theirs = names_of(WideResNet(10, 1, same_padding=True))
    names = {name: ours.replace(".residual.1.1.", ".residual.1.") for name, ours in theirs.items()}
    with pytest.raises(AssertionError):
        agree(network, names, lambda arrays, images: restated.wide_resnet(arrays, images, 10), (32, 32))


def test_nf_resnet_with_gradients_and_sizes_that_no_stride_divides() -> None:
    torch.manual_seed(0)
    network = shaken(NormFreeNet("nf_resnet26", num_classes=4, stochastic_depth=0.1)).eval()
    names = {name.removeprefix("net."): name for name, _ in network.named_parameters()}
    agree(network, names, lambda arrays, images: restated.nf_resnet(arrays, images, (2, 2, 2, 2)), (33, 54))


def test_nf_resnet_50_and_nfnet_f0() -> None:
    for name, again, blocks in (
        ("nf_resnet50", restated.nf_resnet, (3, 4, 6, 3)),
        ("dm_nfnet_f0", restated.nfnet, (1, 2, 6, 3)),
    ):
        torch.manual_seed(0)
        network = shaken(NormFreeNet(name, num_classes=4)).eval()
        images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        arrays = {key.removeprefix("net."): value for key, value in network.state_dict().items()}
        with torch.no_grad():
            logits, expected = network(images), again(arrays, images, blocks)
        assert distance(logits, expected) < 1e-10, name


def test_the_last_blocks_of_n_are_dropped_with_less_than_the_rate() -> None:
    network = NormFreeNet("nf_resnet26", num_classes=4, stochastic_depth=0.16)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0) for block in network.modules() if hasattr(block, "skipinit_gain")
    ]
    assert rates == pytest.approx([0.16 * place / 8 for place in range(8)])


def test_timms_form_differs_where_it_is_said_to() -> None:
    names = ("nf_resnet26", "dm_nfnet_f0")
    for name in names:
        torch.manual_seed(0)
        network = NormFreeNet(name, num_classes=4)
        kinds = {type(module).__name__ for module in network.modules()}
        with torch.device("meta"):
            other = {type(m).__name__ for m in NormFreeNet(name, num_classes=4, faithful=False).modules()}
        assert "ScaledWSConv2d" in kinds - other
