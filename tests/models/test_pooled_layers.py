"""Features of layers within a network: the right numbers, one vector for each image, and clear refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.models import FrozenBody, PooledLayers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    end = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 6, 3), end)


def standardised(vectors: Tensor) -> Tensor:
    centred = vectors - vectors.mean(1, keepdim=True)
    return centred / (centred.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def test_each_layer_is_averaged_over_positions_and_standardised_over_channels() -> None:
    whole, images = network(), torch.randn(5, 3, 8, 8)
    first = whole[0](images)
    second = whole[2](first.relu())
    given = PooledLayers(whole, ["2", "0"])(images)
    expected = torch.cat([standardised(second.mean((2, 3))), standardised(first.mean((2, 3)))], dim=1)
    torch.testing.assert_close(given, expected)  # of the convolution, although the ReLU writes over its output


def test_an_image_has_the_features_it_has_alone() -> None:
    body, images = PooledLayers(network(), ["0", "2"]), torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(body(images), torch.cat([body(image[None]) for image in images]))


def test_tokens_are_averaged_and_vectors_are_taken_as_they_are() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Linear(4, 6), nn.Linear(6, 5)

        def forward(self, tokens: Tensor) -> Tensor:
            hidden: Tensor = self.head(self.embed(tokens).mean(1))
            return hidden

    module, tokens = Tokens(), torch.randn(3, 7, 4)
    hidden = module.embed(tokens).mean(1)
    expected = torch.cat([standardised(hidden), standardised(module.head(hidden))], dim=1)
    torch.testing.assert_close(PooledLayers(module, ["embed", "head"])(tokens), expected)


def test_a_frozen_body_takes_the_layers_and_the_mean_with_the_mirror_image() -> None:
    whole, images = network(), torch.randn(2, 3, 8, 8)
    layers = PooledLayers(network(), ["2"])
    body = FrozenBody(whole, mirror=True, layers=["2"])
    torch.testing.assert_close(body(images), (layers(images) + layers(images.flip(-1))) / 2)
    assert not any(parameter.requires_grad for parameter in body.parameters())
    assert not body.train().network.training


@pytest.mark.parametrize("layers", [[], ["0", "conv"]])
def test_layers_that_are_not_there_are_refused(layers: list[str]) -> None:
    with pytest.raises(ValueError, match=r"layers=.*are no modules of the network, which has \['0', '1'"):
        PooledLayers(network(), layers)


class Odd(nn.Module):
    """Uses one layer twice and another never; a third gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.never, self.pair = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.LSTM(4, 2)

    def forward(self, images: Tensor) -> Any:
        hidden = self.twice(self.twice(images))
        return self.pair(hidden[:, 0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [("twice", "used more than once"), ("never", "does not use"), ("pair", "gives tuple: expected a tensor")],
)
def test_a_layer_that_gives_no_one_tensor_is_refused(layer: str, message: str) -> None:
    body = PooledLayers(Odd(), [layer])
    with pytest.raises(ValueError, match=message):
        body(torch.zeros(2, 3, 4, 4))
    assert not any(module._forward_hooks for module in body.modules())
