"""Activations and output gradients of any size: what an example adds is bounded, and is what its own gradient clipped is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.select import make_engine
from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.mechanism.clip import clip_and_sum, clip_scaled
from lightning_dp.models.weight_standardisation import WSConv2d
from lightning_dp.plan.clipping import Clipping, ClippingStyle
from tests.engines.layers_with_rules import CALLERS_OF, LAYERS_OF, Calling, Layer, numbers

EDGES = (-75, -62, -30, 0, 30, 62, 75)
CLIPPINGS = (Clipping(1e-6), Clipping(1e-7, "per_layer"), Clipping(1e-6, "automatic", 1e-7))
LARGEST = 1e37
"""A norm of this size may count as not finite."""

MORE: dict[str, Layer] = {
    "long Linear": (lambda: nn.Linear(24, 24), numbers(3, 24)),
    "1x1 convolution": (lambda: nn.Conv2d(24, 24, 1), numbers(24, 2, 2)),
    "Conv2d by patches": (lambda: nn.Conv2d(8, 24, 3), numbers(8, 4, 4)),
    "standardised convolution": (lambda: WSConv2d(8, 24, 3), numbers(8, 4, 4)),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 24, 3)), numbers(8, 4, 4)),
    "a layer without a rule": (lambda: Calling(lambda x, w, b: x * w * w, (4,)), numbers(4)),
}
KINDS = {
    **{f"{kind.__name__}-{n}": one for kind, found in LAYERS_OF.items() for n, one in enumerate(found)},
    **{f"{call.__name__}-{n}": one for call, found in CALLERS_OF.items() for n, one in enumerate(found)},
    **MORE,
}


class Scaled(nn.Module):
    """A layer whose inputs and output gradients have the sizes that a test gives them, example by example."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, sizes: Tensor, slope: Tensor) -> Tensor:
        if x.is_floating_point():
            x = x * sizes[:, 0].view(-1, *[1] * (x.ndim - 1))
        return (self.layer(x).flatten(1)[:, :5] * slope).sum(1).mul(sizes[:, 1]).sum()


def example(kind: str, exponents: list[tuple[float, float]], seed: int = 0) -> tuple[Scaled, Any]:
    make, inputs = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Scaled(make())
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        x = inputs(len(exponents))
        slope = torch.randn(len(exponents), 1)
    return module.float(), (x.float() if x.is_floating_point() else x, 2.0 ** torch.tensor(exponents), slope)


def loss_of(module: nn.Module, autocast: bool = False) -> Callable[[Mapping[str, Tensor], Any], tuple[Tensor, Any]]:
    def loss(parameters: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Any]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return functional_call(module, dict(parameters), batch).float(), {}

    return loss


def clipped_in_float64(module: nn.Module, batch: Any, clipping: Clipping, autocast: bool) -> tuple[Tensor, Tensor]:
    """Each example's own gradient by plain autograd, clipped in float64; its norm, of which ∞ says that it is not finite."""
    parts, norms = [], []
    parameters = learning(module)
    for index in range(len(batch[1])):
        loss, _ = loss_of(module, autocast)(parameters, tuple(one[index : index + 1] for one in batch))
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        rows = {
            name: (torch.zeros_like(p) if g is None else g.to_dense()).double()[None]
            for (name, p), g in zip(parameters.items(), found, strict=True)
        }
        sums, norm = clip_and_sum(rows, clipping)
        parts.append(flat(sums))
        norms.append(norm)
    return torch.stack(parts), torch.cat(norms)


def learning(module: nn.Module) -> dict[str, Tensor]:
    """Without biases, which have large gradients wherever those of outputs are large, and would hide a norm of zero."""
    found = {name: p for name, p in module.named_parameters() if p.ndim > 1 or "bias" not in name}
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in found)
    return found


def flat(named: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in named.values()]).double()


def check(
    name: str, kind: str, exponents: list[tuple[float, float]], clipping: Clipping, autocast: bool = False
) -> None:
    module, batch = example(kind, exponents)
    parts, norms = clipped_in_float64(module, batch, clipping, autocast)
    run = loss_of(module, autocast), learning(module), batch, len(exponents), clipping
    ours = make_engine(name, module).clipped_sum(*run)
    found, expected = flat(ours.gradient), parts[torch.isfinite(ours.norms)].sum(0)
    where = f"{name}, {kind}, {exponents}: {ours.norms.tolist()} for {norms.tolist()}"
    assert bool((torch.isfinite(ours.norms) | ~(norms < LARGEST) | ~torch.isfinite(ours.losses)).all()), where
    assert float(found.norm()) <= len(exponents) * clipping.clip_norm * (1 + 1e-5), where
    tolerance = (3e-2 if autocast else 1e-4) * clipping.clip_norm
    if not kind.startswith("InstanceNorm"):  # by another kernel than the layer's own, which differs at these sizes
        assert float((found - expected).norm()) <= tolerance, where


@pytest.mark.parametrize("kind", KINDS)
def test_ghost_adds_the_clipped_gradient_of_activations_and_output_gradients_of_any_size(kind: str) -> None:
    for index, pair in enumerate(product(EDGES, EDGES)):
        check("ghost", kind, [pair], CLIPPINGS[index % len(CLIPPINGS)])


@pytest.mark.parametrize("kind", ["Linear-1", "Conv2d by patches", "standardised convolution", "1x1 convolution"])
def test_so_are_gram_matrices_where_the_processor_flushes_to_zero(kind: str) -> None:
    """Norms of Gram matrices overflow early, so that otherwise no clip norm is in reach of what they miss."""
    torch.set_flush_denormal(True)  # where it cannot be set, the processor holds what is smaller
    try:
        for pair in [(-65, 31), (-66, 30), (31, -65), (-64, 27)]:
            check("ghost", kind, [pair], Clipping(1e-12))
    finally:
        torch.set_flush_denormal(False)


MIXED = [(0.0, 0.0), (-75.0, 62.0), (62.0, -75.0), (75.0, 75.0), (3.0, -2.0)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    "kind", ["Linear-0", "Linear-1", "Conv2d-0", "long Linear", "1x1 convolution", *list(MORE)[2:5]]
)
def test_examples_of_all_sizes_in_one_batch_are_clipped_each_for_itself(kind: str, autocast: bool) -> None:
    for clipping in CLIPPINGS:
        check("ghost", kind, MIXED, clipping, autocast)


@given(
    pairs=st.lists(st.tuples(*[st.floats(-75, 75)] * 2), min_size=1, max_size=4),
    name=st.sampled_from(["ghost", "vmap", "loop"]),
    kind=st.sampled_from(["Linear-0", "Linear-1", "Conv2d-0", "long Linear", "Conv2d by patches", "LayerNorm-0"]),
    clipping=st.sampled_from([*CLIPPINGS, Clipping(1.0), Clipping(1e-12), Clipping(1e12, "per_layer")]),
)
def test_every_engine_adds_the_same(pairs: list[tuple[float, float]], name: str, kind: str, clipping: Clipping) -> None:
    check(name, kind, pairs, clipping)


def test_with_a_keeper_what_would_have_to_be_written_out_adds_nothing() -> None:
    class Keeper:
        names: frozenset[str] = frozenset()

        @contextmanager
        def one_pass(self) -> Iterator[None]:
            yield

    module, batch = example("Linear-0", [(-75, 62), (0, 0)])
    engine = make_engine("ghost", module)
    engine.keeper = Keeper()
    found = engine.clipped_sum(loss_of(module), learning(module), batch, 2, 1e-6)
    assert torch.isfinite(found.norms).tolist() == [False, True]
    assert float(flat(found.gradient).norm()) == pytest.approx(1e-6, rel=1e-5)


@given(
    exponent=st.integers(-140, 123), style=st.sampled_from(get_args(ClippingStyle)), clip_norm=st.floats(1e-12, 1e12)
)
def test_scaled_clipping_is_clipping_in_float64(exponent: int, style: ClippingStyle, clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(exponent + 200)
    rows = {name: torch.randn(3, *shape, generator=generator) * 2.0**exponent for name, shape in SHAPES.items()}
    clipping = Clipping(clip_norm, style)
    exact, norms = clip_and_sum({name: one.double() for name, one in rows.items()}, clipping)
    exact.pop(INDICATOR, None)  # what adapts C follows from the norms
    for found, of in (clip_scaled(rows, clipping), clip_and_sum(rows, clipping)):
        found.pop(INDICATOR, None)
        assert float((flat(found) - flat(exact)).norm()) <= 1e-5 * clip_norm
        torch.testing.assert_close(of.double(), norms, rtol=1e-5, atol=1e-17)
    torch.testing.assert_close(clip_scaled(rows, clipping)[1].double(), norms, rtol=1e-3, atol=0.0)


SHAPES = {"one.weight": (5, 3), "one.bias": (5,), "two.scale": (), "two.empty": (0,)}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_has_no_norm_adds_nothing_scaled_or_not(value: float) -> None:
    rows = {name: torch.full((2, *shape), value) for name, shape in SHAPES.items()}
    for style in get_args(ClippingStyle):
        sums, norms = clip_scaled(rows, Clipping(1.0, style))
        assert all(not bool(one.any()) for one in sums.values())
        assert not bool(torch.isfinite(norms).any())
