"""No style lets an example move the sum by more than the sensitivity it reports, and the noise is scaled from that."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import lightning_dp.mechanism.clip as clip_module
from lightning_dp.batches.microbatch import padded
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.clip import clip_and_sum
from lightning_dp.plan.clipping import Clipping, ClippingStyle, check_clipping, layer_of
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests.engines.family import case
from tests.guarantees.mutations import caught, patched
from tests.nearly import assert_nearly

SLACK = 1 + 2**-20
SHAPES = {"a.weight": (3, 2), "a.bias": (3,), "b.weight": (2,), "scale": ()}
STYLES: list[ClippingStyle] = ["flat", "per_layer", "automatic", "quantile", "slaclip"]


def gradients(examples: int, seed: int, exponents: list[float]) -> dict[str, Tensor]:
    """Random gradients whose layers are of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(examples, *shape, generator=generator, dtype=torch.float64) * 10.0**exponent
        for (name, shape), exponent in zip(SHAPES.items(), exponents, strict=True)
    }


def length(sums: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in sums.values()))


def moved(given_gradients: dict[str, Tensor], gone: int, clipping: Clipping) -> float:
    """By how much the sum changes if one example is taken away."""
    kept = [index for index in range(len(given_gradients["scale"])) if index != gone]
    with_it, _ = clip_and_sum(given_gradients, clipping)
    without, _ = clip_and_sum({name: g[kept] for name, g in given_gradients.items()}, clipping)
    return length({name: with_it[name] - without[name] for name in with_it})


@pytest.mark.parametrize("style", STYLES)
@given(
    seed=st.integers(0, 10_000),
    examples=st.integers(1, 5),
    exponents=st.lists(st.floats(-6, 6), min_size=4, max_size=4),
    clip_norm=st.sampled_from([1e-3, 1.0, 40.0]),
    gamma=st.sampled_from([1e-4, 0.01, 1.0]),
)
def test_one_example_moves_the_sum_by_at_most_the_sensitivity(
    style: ClippingStyle, seed: int, examples: int, exponents: list[float], clip_norm: float, gamma: float
) -> None:
    clipping = Clipping(clip_norm, style, gamma)
    given_gradients = gradients(examples, seed, exponents)
    for gone in range(examples):
        assert moved(given_gradients, gone, clipping) <= clipping.sensitivity * SLACK


@pytest.mark.parametrize("style", STYLES)
def test_the_sensitivity_is_reached_and_so_no_larger_than_it_must_be(style: ClippingStyle) -> None:
    long = gradients(1, 0, [6.0] * 4)
    assert length(clip_and_sum(long, Clipping(0.3, style))[0]) == pytest.approx(
        Clipping(0.3, style).sensitivity, rel=1e-6
    )


def noise_is_scaled_from_the_sensitivity(style: ClippingStyle) -> None:
    plan = PrivacyPlan(
        noise_multiplier=3.0, clip_norm=0.25, delta=1e-5, dataset_size=100, expected_batch_size=10, clipping=style
    )
    assert_nearly(plan.noise_std, 3.0 * plan.clipping_rule.sensitivity)
    reached = length(clip_and_sum(gradients(1, 0, [6.0] * 4), plan.clipping_rule)[0])
    assert plan.noise_std >= 3.0 * reached / SLACK


@pytest.mark.parametrize("style", STYLES)
def test_the_noise_is_scaled_from_the_reported_sensitivity(style: ClippingStyle) -> None:
    noise_is_scaled_from_the_sensitivity(style)
    with caught(patched((Clipping, "sensitivity", property(lambda rule: rule.clip_norm / 2)))):
        noise_is_scaled_from_the_sensitivity(style)
    with caught(patched((PrivacyPlan, "noise_std", property(lambda plan: plan.noise_multiplier * plan.clip_norm**2)))):
        noise_is_scaled_from_the_sensitivity(style)


def the_sum_of_long_gradients_stays_within(style: ClippingStyle) -> None:
    clipping = Clipping(0.3, style)
    assert moved(gradients(3, 1, [6.0] * 4), 1, clipping) <= clipping.sensitivity * SLACK


def test_a_budget_of_c_for_each_layer_is_noticed() -> None:
    """The most natural mistake of all: the total is then C·√L."""
    the_sum_of_long_gradients_stays_within("per_layer")
    with caught(patched((Clipping, "budget", lambda rule, layers: rule.clip_norm))):
        the_sum_of_long_gradients_stays_within("per_layer")


def test_a_parameter_of_a_layer_clipped_on_its_own_is_noticed() -> None:
    """Budgets for L layers, spent by more parts than that."""
    the_sum_of_long_gradients_stays_within("per_layer")
    each = lambda names: {name: name for name in names}  # noqa: E731 (a patch, not a function with a life of its own)
    original = Clipping.budget
    with caught(
        patched(
            (Clipping, "layers", lambda rule, names: each(names)),
            (Clipping, "budget", lambda rule, layers: original(rule, 3)),
        )
    ):
        the_sum_of_long_gradients_stays_within("per_layer")


def test_automatic_scaling_that_overshoots_is_noticed() -> None:
    the_sum_of_long_gradients_stays_within("automatic")
    original = clip_module.clip_factors
    with caught(patched((clip_module, "clip_factors", lambda norms, rule: original(norms, rule) * (1 + rule.gamma)))):
        the_sum_of_long_gradients_stays_within("automatic")


def the_number_of_layers_is_public() -> None:
    """A loss that happens to reach one layer only must not give it the other layers' budget."""
    of = case("unused and frozen parameters", 1, 0)
    found = GhostEngine(of.module).clipped_sum(
        of.loss_function(), of.parameters(), of.batch, 1, Clipping(0.01, "per_layer")
    )
    assert float(found.norms) > 0.1
    assert length(found.gradient) == pytest.approx(0.01 / math.sqrt(2), rel=1e-6)


def test_the_layers_are_those_of_the_module_and_not_of_the_step() -> None:
    the_number_of_layers_is_public()
    original: Any = clip_module.Factors.of.__func__

    def of_what_came(cls: Any, norms: Any, names: Any, *rest: Any) -> Any:
        return original(cls, norms, list(norms), *rest)

    with caught(patched((clip_module.Factors, "of", classmethod(of_what_came)))):
        the_number_of_layers_is_public()


def padding_does_not_count(engine: Any, style: ClippingStyle) -> None:
    """Rows of padding are copies of a real example: one that counted would be in the sum twice, with sensitivity 2C."""
    of = case("mlp", 5, 0)
    batch = padded(of.batch, 5, 8)
    run = (of.loss_function(), of.parameters())
    found = engine(of.module).clipped_sum(*run, batch, 8, Clipping(0.1, style), counted=5)
    alone = engine(of.module).clipped_sum(*run, of.batch, 5, Clipping(0.1, style))
    for name, gradient in alone.gradient.items():
        assert torch.allclose(found.gradient[name], gradient, rtol=1e-9, atol=1e-12)
    assert len(found.norms) == len(found.losses) == len(found.outputs["output"]) == 5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("engine", [GhostEngine, lambda _: VmapEngine()], ids=["ghost", "vmap"])
def test_padding_that_counts_is_noticed(engine: Any, style: ClippingStyle) -> None:
    padding_does_not_count(engine, style)
    original: Any = clip_module.Factors.of.__func__

    def all_count(cls: Any, norms: Any, names: Any, clipping: Any, counted: Any = None) -> Any:
        return original(cls, norms, names, clipping)

    with caught(patched((clip_module.Factors, "of", classmethod(all_count)))):
        padding_does_not_count(engine, style)


@settings(max_examples=50)
@given(names=st.lists(st.sampled_from([*SHAPES, "b.parametrizations.weight.original0", "c.d.bias"]), min_size=1))
def test_every_parameter_is_in_exactly_one_layer(names: list[str]) -> None:
    layers = Clipping(1.0, "per_layer").layers(names)
    assert set(layers) == set(names)
    assert set(Clipping(1.0).layers(names).values()) == {""}
    assert layer_of("b.parametrizations.weight.original0") == layer_of("b.weight") == "b"


@pytest.mark.parametrize(
    ("style", "gamma", "clip_norm", "said"),
    [
        ("layerwise", 0.01, 1.0, "clipping='layerwise': expected one of flat, per_layer, automatic"),
        ("automatic", 0.0, 1.0, "automatic_gamma=0.0: expected a finite number above 0"),
        ("automatic", math.inf, 1.0, "automatic_gamma=inf"),
        ("automatic", math.nan, 1.0, "automatic_gamma=nan"),
        ("automatic", 0.01, math.inf, "clipping='automatic' with clip_norm=inf"),
        ("quantile", 0.01, math.inf, "clipping='quantile' with clip_norm=inf"),
        ("slaclip", 0.01, math.inf, "clipping='slaclip' with clip_norm=inf"),
    ],
)
def test_what_is_no_style_is_refused(style: str, gamma: float, clip_norm: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_clipping(style, gamma, clip_norm)
