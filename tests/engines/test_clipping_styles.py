"""Every engine gives every clipping style's sum, as plain backward passes and plain arithmetic give it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.plan.clipping import Clipping, ClippingStyle
from tests.engines import oracle
from tests.engines.family import FAMILY, Case, case

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")

ENGINES = ["ghost", "vmap", "loop"]
STYLES: list[ClippingStyle] = ["per_layer", "automatic", "quantile", "slaclip"]

LAYERS = {  # written down by hand: what belongs together in each member of the family
    "mlp": [{"0.weight", "0.bias"}, {"2.weight", "2.bias"}],
    "convolution and GroupNorm": [{"0.weight", "0.bias"}, {"1.weight", "1.bias"}, {"4.weight", "4.bias"}],
    "embedding": [{"0.weight"}, {"2.weight", "2.bias"}],
    "tied weights": [{"embedding.weight"}],
    "reused layer": [{"layer.weight", "layer.bias"}, {"head.weight", "head.bias"}],
    "unused and frozen parameters": [{"idle.weight", "idle.bias"}, {"head.weight", "head.bias"}],
    "scalar parameter": [{"log_scale"}, {"head.weight", "head.bias"}],
    "weight norm and LayerNorm": [
        {"0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"},
        {"2.weight", "2.bias"},
        {"3.weight", "3.bias"},
    ],
    "attention": [
        {"attention.in_proj_weight", "attention.in_proj_bias"},
        {"attention.out_proj.weight", "attention.out_proj.bias"},
        {"norm.weight", "norm.bias"},
        {"head.weight", "head.bias"},
    ],
}


def engine_for(name: str, of: Case) -> Engine:
    return GhostEngine(of.module) if name == "ghost" else {"vmap": VmapEngine, "loop": LoopEngine}[name]()


def norm(parts: Any) -> float:
    return math.sqrt(sum(float(part.square().sum()) for part in parts))


def by_hand(gradient: dict[str, Tensor], layers: list[set[str]], clipping: Clipping) -> dict[str, Tensor]:
    """One example's bounded gradient."""
    c = clipping.clip_norm
    if clipping.style == "automatic":
        factor = c / (norm(gradient.values()) + clipping.gamma)
        return {name: g * factor for name, g in gradient.items()}
    bounded = {}
    whole = norm(gradient.values())
    if clipping.style in ("quantile", "slaclip"):  # clipped as a whole, and coordinates beside it
        layers = [set(gradient)]
    if clipping.style == "quantile":
        bounded[INDICATOR] = torch.tensor([0.1 * c if whole <= c else -0.1 * c], dtype=torch.float64)
    if clipping.style == "slaclip":
        filled = [min(1.0, max(0.0, 10 * (1 - whole / c) - k)) * c / math.sqrt(10) for k in range(10)]
        bounded[INDICATOR] = torch.tensor(filled, dtype=torch.float64)
    for layer in layers:
        size = norm(gradient[name] for name in layer)
        factor = min(1.0, c / math.sqrt(len(layers)) / size) if size else 1.0
        bounded.update({name: gradient[name] * factor for name in layer})
    return bounded


def sum_by_hand(of: Case, layers: list[set[str]], clipping: Clipping, indices: Any = None) -> dict[str, Tensor]:
    total = {name: torch.zeros_like(p) for name, p in of.parameters().items()}
    if clipping.coordinates:
        total[INDICATOR] = torch.zeros(clipping.coordinates, dtype=torch.float64)
    for index in range(of.examples) if indices is None else indices:
        for name, g in by_hand(oracle.per_example(of, index)[0], layers, clipping).items():
            total[name] += g
    return total


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert set(one) == set(other)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FAMILY)
@settings(max_examples=5)
@given(examples=st.integers(1, 5), seed=st.integers(0, 10_000), clip_norm=st.sampled_from([0.05, 0.7, 3.0]))
def test_every_engine_gives_every_style(
    engine: str, style: ClippingStyle, name: str, examples: int, seed: int, clip_norm: float
) -> None:
    of, clipping = case(name, examples, seed), Clipping(clip_norm, style, gamma=0.1)
    expected = sum_by_hand(of, LAYERS[name], clipping)
    found = engine_for(engine, of).clipped_sum(of.loss_function(), of.parameters(), of.batch, examples, clipping)
    same(found.gradient, expected)
    norms = [norm(oracle.per_example(of, index)[0].values()) for index in range(examples)]
    torch.testing.assert_close(found.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_recurrent_layers_have_the_styles_of_the_loop() -> None:
    of, clipping = case("recurrent", 3, 0), Clipping(0.1, "per_layer")
    cell = {name for name in of.parameters() if name.startswith("cell")}
    found = LoopEngine().clipped_sum(of.loss_function(), of.parameters(), of.batch, 3, clipping)
    same(found.gradient, sum_by_hand(of, [cell, {"head.weight", "head.bias"}], clipping))


@pytest.mark.parametrize("style", ["flat", *STYLES])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_example_adds_nothing_in_any_layer(engine: str, style: ClippingStyle, value: float) -> None:
    """With a bias of its own behind it, the last layer's gradient alone would still be finite in part."""
    of, clipping = case("mlp", 5, 0), Clipping(0.5, style)
    of.batch[0][3] = value
    layers = LAYERS["mlp"] if style == "per_layer" else [set(of.parameters())]
    found = engine_for(engine, of).clipped_sum(of.loss_function(), of.parameters(), of.batch, 5, clipping)
    same(found.gradient, sum_by_hand(of, layers, clipping, indices=[0, 1, 2, 4]))
    assert (~torch.isfinite(found.norms)).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("style", ["flat", *STYLES])
@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=8)
@given(
    name=st.sampled_from(sorted(FAMILY)),
    counted=st.integers(1, 4),
    padding=st.integers(0, 3),
    seed=st.integers(0, 1000),
    broken=st.booleans(),
)
def test_padding_adds_exactly_nothing(
    engine: str, style: ClippingStyle, name: str, counted: int, padding: int, seed: int, broken: bool
) -> None:
    """Whatever stands in the rows of padding: the sum is that of the first ones, and only those are reported."""
    of, clipping = case(name, counted + padding, seed), Clipping(0.3, style)
    if broken and of.batch[0].is_floating_point():
        of.batch[0][counted:] = math.nan
    real = Case(of.module, tuple(part[:counted] for part in of.batch), counted, of.loss)
    run = (of.loss_function(), of.parameters())
    padded = engine_for(engine, of).clipped_sum(*run, of.batch, of.examples, clipping, counted=counted)
    alone = engine_for(engine, of).clipped_sum(*run, real.batch, counted, clipping)
    same(padded.gradient, alone.gradient)
    for one, other in ((padded.norms, alone.norms), (padded.losses, alone.losses)):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(padded.outputs["output"], alone.outputs["output"], rtol=1e-9, atol=1e-9)
