"""Every layer with a rule, and every way around the rules, against one plain backward pass per example."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost import positions as sums_over_positions
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.rules import written_out
from lightning_dp.engines.ghost.rules.convolution import Convolution
from lightning_dp.engines.ghost.rules.written_out import FORMS
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.plan.clipping import Clipping
from tests.engines.against_loop import agree, both, build, same
from tests.engines.family import FAMILY, case

SEEDS = st.integers(0, 10_000)
CLIPPINGS = st.sampled_from([0.05, 1.0, math.inf, Clipping(0.1, "per_layer"), Clipping(0.1, "automatic")])


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@settings(max_examples=5)
@given(examples=st.integers(1, 6), seed=SEEDS, clipping=CLIPPINGS)
def test_the_family_of_models(name: str, examples: int, seed: int, clipping: Clipping | float) -> None:
    of = case(name, examples, seed)
    run = (of.loss_function(), of.parameters(), of.batch, examples, clipping)
    same(GhostEngine(of.module).clipped_sum(*run), LoopEngine().clipped_sum(*run))


class TestRules:
    @given(
        leading=st.lists(st.integers(1, 7), max_size=2),
        features=st.tuples(st.integers(1, 12), st.integers(1, 12)),
        bias=st.booleans(),
        examples=st.integers(1, 4),
        seed=SEEDS,
        clipping=CLIPPINGS,
    )
    def test_linear(
        self,
        leading: list[int],
        features: tuple[int, int],
        bias: bool,
        examples: int,
        seed: int,
        clipping: Clipping | float,
    ) -> None:
        def make() -> nn.Module:
            return nn.Sequential(nn.Linear(*features, bias=bias), nn.Tanh(), nn.Linear(features[1], 2))

        agree(*build(make, seed, examples, *leading, features[0]), clipping)

    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @settings(max_examples=60)
    @given(data=st.data(), axes=st.integers(1, 3), examples=st.integers(1, 3), seed=SEEDS, clipping=CLIPPINGS)
    def test_convolution(self, data: Any, axes: int, examples: int, seed: int, clipping: Clipping | float) -> None:
        def per_axis(low: int, high: int) -> tuple[int, ...]:
            return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

        groups = data.draw(st.sampled_from([1, 1, 2]))
        mode = data.draw(st.sampled_from(["zeros", "zeros", "reflect", "circular"]))
        kernel, dilation = per_axis(1, 3), per_axis(1, 2)
        padding = data.draw(st.sampled_from(["valid", "same", *[per_axis(0, 2)] * 3]))
        stride = (1,) * axes if padding == "same" else per_axis(1, 2)
        layer = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]

        def make() -> nn.Module:
            convolve = layer(
                2 * groups, 3 * groups, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups,
                bias=data.draw(st.booleans()), padding_mode=mode,
            )  # fmt: skip
            return nn.Sequential(convolve, nn.Tanh(), layer(3 * groups, 2, 1))

        engine = agree(*build(make, seed, examples, 2 * groups, *(5 + n for n in range(axes))), clipping)
        assert set(engine.handled.values()) == {layer.__name__}

    @pytest.mark.parametrize("gram", [True, False])
    @pytest.mark.parametrize("kernel", [1, 3])
    def test_convolution_either_way(self, gram: bool, kernel: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Convolution, "_gram_share", lambda *_: 0.0 if gram else 100.0)
        agree(*build(lambda: nn.Conv2d(3, 4, kernel, stride=2, padding=1, dilation=2), 0, 3, 3, 9, 8))

    @pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("form", ["groups", "patches"])
    def test_gradients_written_out_in_every_form(
        self, form: str, groups: int, kind: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also with several samples an example, and where patches do not all lie in memory at once."""
        monkeypatch.setitem(written_out.AT_ONCE, "cpu", 500)
        axes = {nn.Conv1d: 1, nn.Conv2d: 2}[kind]
        kernel, *settings = ((value,) * axes for value in (3, 2, 1, 2))
        rule, sizes = Convolution(*settings, groups), (8, 9)[:axes]
        layer, x = build(lambda: kind(4, 6, kernel, *settings, groups=groups), 0, 3, 2, 4, *sizes)
        g = torch.randn_like(layer(x.flatten(0, 1))).unflatten(0, (3, 2))
        ways = [FORMS[name](rule, x, g, layer.weight.detach(), Buffers()) for name in ("slices", form)]
        torch.testing.assert_close(*ways)

    @pytest.mark.parametrize("layer", [nn.Conv1d(2, 3, 3), nn.InstanceNorm1d(2, affine=True)])
    def test_inputs_without_a_batch_axis(self, layer: nn.Module) -> None:
        class Unbatched(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = layer.double()

            def forward(self, x: Tensor) -> Tensor:
                output = self.layer(x[0])
                return output * torch.arange(output.shape[-1])

        agree(Unbatched(), torch.randn(3, 2, 6, dtype=torch.float64))

    @given(padding_idx=st.sampled_from([None, 0, -1]), width=st.integers(1, 6), words=st.integers(2, 30), seed=SEEDS)
    def test_embedding(self, padding_idx: int | None, width: int, words: int, seed: int) -> None:
        module, _ = build(
            lambda: nn.Sequential(nn.Embedding(words, 3, padding_idx=padding_idx), nn.Linear(3, 2)), seed, 1
        )
        agree(module, torch.randint(words, (3, width), generator=torch.Generator().manual_seed(seed)))

    @given(data=st.data(), seed=SEEDS, examples=st.integers(1, 4), bias=st.booleans())
    def test_normalisation(self, data: Any, seed: int, examples: int, bias: bool) -> None:
        make, *shape = data.draw(
            st.sampled_from([
                (lambda: nn.LayerNorm(6, bias=bias), 6),
                (lambda: nn.LayerNorm((3, 6), eps=0.1, bias=bias), 2, 3, 6),
                (lambda: nn.RMSNorm(6), 4, 6),
                (lambda: nn.RMSNorm((3, 6), eps=0.1), 3, 6),
                (lambda: nn.GroupNorm(2, 6), 6),
                (lambda: nn.GroupNorm(3, 6, eps=0.1), 6, 4, 3),
                (lambda: nn.InstanceNorm1d(6, affine=True), 6, 4),
                (lambda: nn.InstanceNorm2d(6, affine=True), 6, 4, 3),
                (lambda: nn.InstanceNorm3d(2, affine=True), 2, 2, 2, 3),
            ])
        )  # fmt: skip
        module, inputs = build(make, seed, examples, *shape)
        weights = torch.linspace(-1, 1, inputs[0].numel(), dtype=torch.float64).view(1, *shape)
        engine = agree(module, 3 + inputs, loss=lambda output: (output * weights).sin().sum())
        assert "per example" not in engine.handled.values()


class Standardised(nn.Conv2d):
    """Weight standardisation with a gain, written as a layer of one's own (Qiao et al. 2019, arXiv 1903.10520)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        scale = self.gain * (variance * self.weight[0].numel()).clamp(min=1e-4).rsqrt()
        return F.conv2d(
            x, (self.weight - mean) * scale, self.bias, self.stride, self.padding, self.dilation, self.groups
        )


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight + weight.square()


def _parametrised(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


class Channels(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.normalized_shape, self.weight, self.bias, self.eps).movedim(-1, 1)


class Scale(nn.Module):
    """A leaf module that uses its parameter as no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


class Hooked(nn.Conv2d):
    """A layer of one's own that scales its input by a parameter before it convolves."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.power = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.power)


OTHER_WAYS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight standardisation": (lambda: Standardised(3, 4, 3, padding=1), "from within"),
    "… with groups": (lambda: Standardised(3, 6, 3, groups=3, bias=False), "from within"),
    "parametrised convolution": (lambda: _parametrised(nn.Conv2d(3, 4, 3)), "from within"),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "from within"),
    "orthogonal 1×1": (lambda: parametrizations.orthogonal(nn.Conv2d(3, 3, 1)), ""),
    "LayerNorm of channels": (lambda: Channels(3), "from within"),
    "transposed convolution": (lambda: nn.ConvTranspose2d(3, 4, 3), "per example"),
    "a scale": (Scale, "per example"),
    "a scaled convolution": (lambda: Hooked(3, 4, 3), "per example"),
    "PReLU": (lambda: nn.PReLU(3), "per example"),
    "two of them": (lambda: nn.Sequential(Standardised(3, 4, 3), Scale2(), nn.Conv2d(4, 2, 3)), ""),
}


class Multiplying(nn.Module):
    """A linear layer written by hand, its weight lying as in GPT-2."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.weight, self.bias = nn.Parameter(torch.ones(6, 4)), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "addmm":
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])
        if self.how == "scaled":
            return torch.addmm(self.bias, x.flatten(0, -2), self.weight, beta=0.5)
        if self.how == "the other way":
            return torch.addmm(self.bias[:, None], self.weight.t(), x.flatten(0, -2).t())
        return {"@": lambda: x @ self.weight, "matmul": lambda: torch.matmul(x, self.weight)}[self.how]() + self.bias


@pytest.mark.parametrize(
    ("how", "handled"),
    [
        ("addmm", "from within"),
        ("@", "per example"),  # the bias is added by itself, so the layer is repeated with copies
        ("matmul", "per example"),
        ("scaled", "per example"),
        ("the other way", "per example"),
    ],
)
@pytest.mark.parametrize("positions", [1, 12])
def test_products_written_by_hand(how: str, handled: str, positions: int) -> None:
    engine = agree(*build(lambda: Multiplying(how), 3, 3, positions, 6), clipping=0.3)
    assert all(handled in way for way in engine.handled.values()), engine.handled


def test_a_product_with_a_weight_alone_is_kept_books_of() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight

    engine = agree(*build(Alone, 3, 3, 5, 6), clipping=0.3)
    assert engine.handled == {"weight": "Alone, from within"}


class Scale2(Scale):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(4, 1, 1))


@pytest.mark.parametrize("name", OTHER_WAYS)
def test_layers_without_a_rule_of_their_own(name: str) -> None:
    make, how = OTHER_WAYS[name]
    engine = agree(*build(make, 3, 3, 3, 6, 6), clipping=0.3)
    assert all(how in handled for handled in engine.handled.values()), engine.handled


class Views(nn.Module):
    """K views of an example, on an axis of their own, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), Standardised(4, 4, 3), nn.Conv2d(4, 4, 1, stride=2),
            nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x.flatten(0, 1)).unflatten(0, x.shape[:2])


@pytest.mark.parametrize("views", [1, 4])
def test_views_of_an_example_are_one_example(views: int) -> None:
    agree(*build(Views, 0, 3, views, 2, 6, 6))


class Inplace(nn.Module):
    """Overwrites layers' outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 3, 3), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = F.elu(self.first(x), inplace=True)
        h = self.second(h.flatten(2))
        h *= 2
        return h.add_(1)


def test_outputs_that_are_overwritten_in_place() -> None:
    agree(*build(Inplace, 0, 3, 2, 6, 6))


class Positions(nn.Module):
    """Position embeddings, which no example's data enters, and a class token."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.start, self.head = nn.Parameter(torch.zeros(1, 1, 4)), nn.Linear(4, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.head(torch.tanh(torch.cat([self.start.expand(len(h), -1, -1), h], dim=1)))


def test_a_layer_that_no_example_enters() -> None:
    module, _ = build(Positions, 0, 1)
    engine = agree(module, torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0)))
    assert engine.handled["positions.weight"] == "Embedding"
    assert engine.handled["start"] == "per example"


def test_a_weight_that_is_also_used_beside_its_layer() -> None:
    """Its layer's share and the other add up, in each example's norm too."""

    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum() + self.layer.weight.square().sum() * x.mean()

    agree(*build(Penalised, 0, 3, 4))


def test_frozen_layers_and_frozen_parts_of_layers() -> None:
    def make() -> nn.Module:
        module = nn.Sequential(nn.Conv2d(2, 3, 3), nn.GroupNorm(1, 3), nn.Conv2d(3, 2, 3), Standardised(2, 2, 1))
        module[0].requires_grad_(False)
        for parameter in (module[1].bias, module[2].weight, module[3].weight):
            parameter.requires_grad_(False)
        return module

    ghost, loop, _ = both(*build(make, 0, 3, 2, 7, 7))
    same(ghost, loop)
    assert set(ghost.gradient) == {"1.weight", "2.bias", "3.bias", "3.gain"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Linear", "Conv2d"])
def test_norms_and_sums_are_kept_in_float32(kind: str, dtype: torch.dtype) -> None:
    layer, shape = {"Linear": (nn.Linear(64, 64), (4, 3, 64)), "Conv2d": (nn.Conv2d(8, 8, 3), (4, 8, 6, 6))}[kind]
    module = nn.Sequential(layer, nn.Tanh()).to(dtype)
    ghost, loop, _ = both(module, torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    assert {tensor.dtype for tensor in (*ghost.gradient.values(), ghost.norms)} == {torch.float32}
    torch.testing.assert_close(ghost.norms, loop.norms, rtol=1e-5 if dtype == torch.float32 else 2e-2, atol=1e-6)


def test_autocast_computes_layers_in_bfloat16_and_norms_in_float32() -> None:
    module, inputs = build(
        lambda: nn.Sequential(nn.Conv2d(2, 8, 3), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(2), nn.Linear(16, 9)),
        0,
        5,
        2,
        6,
        6,
    )
    module, inputs = module.float(), inputs.float()
    with torch.autocast("cpu", torch.bfloat16):
        ghost, loop, _ = both(module, inputs)
    assert {tensor.dtype for tensor in (*ghost.gradient.values(), ghost.norms)} == {torch.float32}
    torch.testing.assert_close(ghost.norms, loop.norms, rtol=5e-2, atol=1e-3)


def test_normalisations_of_more_numbers_than_are_worked_on_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sums_over_positions, "IN_CACHE", 50)

    def make() -> nn.Module:
        return nn.Sequential(nn.LayerNorm(6), nn.Tanh(), nn.RMSNorm(6), nn.Tanh(), nn.LayerNorm((4, 6)))

    agree(*build(make, 0, 5, 4, 6))


def test_the_narrower_factor_takes_the_clipping_factors() -> None:
    """Wide to narrow and narrow to wide, as Gram matrices and as single positions."""
    for widths in ((40, 2), (2, 40)):
        for positions in (1, 4):
            agree(*build(lambda w=widths: nn.Sequential(nn.Linear(*w), nn.Tanh()), 0, 3, positions, widths[0]))
