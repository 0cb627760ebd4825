"""Weights that are projections are recognised, others are not, and norms through them are right and never short."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_dp.engines.ghost import projection as rule
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.contribution import Channels, Factored, Written
from lightning_dp.engines.ghost.projection import Projection, find_projection
from lightning_dp.engines.ghost.rules.convolution import Convolution
from lightning_dp.models.weight_standardisation import WSConv2d
from tests.engines.against_loop import agree, build

Weight = Callable[[Tensor, Tensor], Tensor]


def standardised(v: Tensor, gain: Tensor) -> Tensor:
    variance, mean = torch.var_mean(v, dim=(1, 2), correction=0, keepdim=True)
    return (v - mean) * gain * (variance * v[0].numel()).clamp(min=1e-4).rsqrt()


PROJECTIONS: dict[str, Weight] = {
    "weight standardisation": standardised,
    "… with a scale, an offset in ε and no gain": lambda v, gain: (
        1.7 * (v - v.mean((1, 2), True)) / (v.var((1, 2), keepdim=True) + 1e-2).sqrt()
    ),
    "… whose clamp is active": lambda v, gain: standardised(1e-4 * v, gain),
    "centring": lambda v, gain: v - v.mean((1, 2), keepdim=True),
    "weight normalisation": lambda v, gain: gain * v / v.flatten(1).norm(dim=1)[:, None, None],
    "a gain alone": lambda v, gain: gain * v,
}

OTHERS: dict[str, Weight] = {
    "nearly": lambda v, gain: standardised(v, gain) + 1e-3 * v**3,
    "nearly, in the gain": lambda v, gain: standardised(v, gain) + 1e-3 * gain * v.roll(1, 2),
    "channels that mix": lambda v, gain: standardised(v, gain) + 1e-3 * v.roll(1, 0),
    "channels that share a scale": lambda v, gain: gain * v / v.norm(),
    "a square": lambda v, gain: v.square() * gain,
    "a constant channel": lambda v, gain: gain.expand_as(v) + 0 * v,
}


def way_back(
    weight: Weight, dtype: torch.dtype
) -> tuple[Tensor, dict[str, torch.Size], Callable[..., dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    v = (0.3 + torch.randn(5, 3, 12, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    gain = (1 + torch.rand(5, 1, 1, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    w = weight(v, gain)

    def back(gradients: Tensor, batched: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(w, [v, gain], gradients, True, allow_unused=True, is_grads_batched=batched)
        return {name: g for name, g in zip(("v", "gain"), found, strict=True) if g is not None}

    return w.detach(), {"v": v.shape, "gain": gain.shape}, back


def found(
    weight: Weight, dtype: torch.dtype
) -> tuple[Projection | None, Tensor, dict[str, torch.Size], Callable[..., dict[str, Tensor]]]:
    w, shapes, back = way_back(weight, dtype)
    return find_projection(w, shapes, back, Buffers()), w, shapes, back


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_are_recognised_and_their_contributions_are_the_whole_way_back(
    name: str, dtype: torch.dtype
) -> None:
    projection, w, shapes, back = found(PROJECTIONS[name], dtype)
    assert projection is not None
    gradients = torch.randn(4, *w.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    factors = torch.rand(4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
    shares, expected = projection.contributions(Written(gradients), shapes), back(gradients, True)
    assert shares.keys() == expected.keys()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for parameter, rows in expected.items():
        share, present = shares[parameter], torch.tensor([1, 0, 1, 1])
        for one, all_rows in ((share, rows), (share.without(present == 0), rows * present.view(4, 1, 1, 1))):
            torch.testing.assert_close(
                one.norms().values, all_rows.flatten(1).norm(dim=1), rtol=tolerance, atol=tolerance
            )
            torch.testing.assert_close(one.rows(), all_rows, rtol=tolerance, atol=tolerance)
            weighted = torch.einsum("b,b...->...", factors, all_rows)
            torch.testing.assert_close(one.weighted_sum(factors), weighted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_projection_is_not_taken_for_one(name: str, dtype: torch.dtype) -> None:
    assert found(OTHERS[name], dtype)[0] is None


@pytest.mark.parametrize("outside", [1.0, 1e-2, 1e-3, 1e-4])
def test_a_norm_is_never_short_however_much_of_a_gradient_drops_out(outside: float) -> None:
    """Gradients along 1 and w vanish on the way back; in float32 the rest must not vanish with them."""
    projection, w, shapes, _ = found(standardised, torch.float32)
    assert projection is not None
    generator = torch.Generator().manual_seed(3)
    along = torch.randn(50, 5, 1, 1, generator=generator) + w * torch.randn(50, 5, 1, 1, generator=generator)
    gradients = along + outside * torch.randn(50, *w.shape, generator=generator)
    exact = found(standardised, torch.float64)[3](gradients.double(), True)["v"].flatten(1).norm(dim=1)
    norms = projection.contributions(Written(gradients), shapes)["v"].norms().values
    assert bool((norms >= exact * (1 - 1e-6)).all())


def test_a_direction_that_says_nothing_about_a_channel_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights seeded like the random direction lie along it: any α would explain what comes back."""
    monkeypatch.setattr(rule, "_SEED", 0)
    assert found(standardised, torch.float64)[0] is None


class TestChannelsThatAreNotWrittenOut:
    """A standardised convolution's norms from positions alone, no example's gradient being formed."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), (2, 0, 1), (1, 2, 2)])
    def test_they_give_what_the_loop_gives(
        self, bias: bool, stride: int, padding: int, dilation: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        asked: list[bool] = []
        usual = Convolution._channels

        def channels(*given: object) -> Channels | None:
            found: Channels | None = usual(*given)
            asked.append(found is not None)
            return found

        monkeypatch.setattr(Convolution, "_gram_share", lambda *_: 0.0)
        monkeypatch.setattr(Convolution, "_channels", channels)

        def make() -> nn.Module:
            layer = WSConv2d(3, 5, 3, stride, padding, dilation)
            layer.bias = layer.bias if bias else None
            return nn.Sequential(layer, nn.Tanh(), WSConv2d(5, 4, 2))

        for examples in (1, 3, 4, 5):  # every clipping style
            agree(*build(make, examples, examples, 3, 7, 6))
        assert asked
        assert all(asked)

    def test_they_are_never_short_where_positions_cancel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Convolution, "_gram_share", lambda *_: 0.0)
        generator = torch.Generator().manual_seed(4)
        x = torch.randn(20, 3, 1, 1, generator=generator) + 1e-4 * torch.randn(20, 3, 6, 6, generator=generator)
        g = torch.randn(20, 5, 5, 5, generator=generator)
        g -= g.mean((2, 3), keepdim=True)
        weight = torch.randn(5, 3, 2, 2, generator=generator)
        basis = torch.stack([torch.full((5, 12), 12**-0.5), weight.flatten(1) - weight.flatten(1).mean(1, True)], dim=2)
        basis = basis / basis.norm(dim=1, keepdim=True)
        operation = Convolution((1, 1), (0, 0), (1, 1), 1, own_axes=0, keeps_output=True)
        output = operation.forward(x, weight, None)
        found = operation.of_weight(x, g, weight, output.saved, Buffers())
        assert isinstance(found, Factored)
        channels = found.channels(basis)
        assert channels is not None
        exact = operation.of_weight(x.double(), g.double(), weight.double(), None, Buffers()).rows().flatten(2)
        squares = exact.square().sum(2)
        assert bool((channels.squares + channels.errors >= squares).all())
        assert bool((channels.squares < squares).any()), "nothing was lost to rounding, so nothing was tested"


class TestBuffers:
    def test_memory_is_used_again_and_does_not_grow_with_sizes_that_vary(self) -> None:
        buffers, like = Buffers(), torch.empty(0)
        for size in (4, 7, 5, 9, 2, 8):
            first, second = buffers.take((size, 3), like), buffers.take((size, 2), like)
            assert first.shape == (size, 3)
            first.fill_(1)
            second.fill_(2)
            assert bool((first == 1).all())
            buffers.take_back()
        assert len(buffers._free) == 2

    def test_types_are_kept_apart(self) -> None:
        buffers = Buffers()
        for dtype in (torch.float32, torch.float64):
            assert buffers.take((3,), torch.empty(0, dtype=dtype)).dtype == dtype
            buffers.take_back()
        assert len(buffers._free) == 2
