"""Every rule in the registry against gradients that anybody would compute, one example at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost import GhostEngine, registry
from lightning_dp.engines.ghost.call import Operation
from lightning_dp.engines.ghost.rules.linear import Linear
from tests.engines import oracle
from tests.engines.against_loop import agree, build
from tests.engines.family import Case
from tests.engines.layers_with_rules import CALLERS_OF, LAYERS_OF, Layer

KINDS = [*registry.LAYERS, *registry.COMPOSITES]
EXAMPLES = (1, 3)


def loss(output: Tensor, _: Tensor) -> Tensor:
    """Smooth, and different at every coordinate of the output."""
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return (output + weights).sin().pow(2).sum()


def right_and_handled(layer: Layer, examples: int, clip_norm: float) -> set[str]:
    """How the engine found the gradients of a layer, after it has found the right ones."""
    make, inputs = layer
    with torch.random.fork_rng():
        torch.manual_seed(examples)
        module = make().double()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.5)
        case = Case(module, (inputs(examples), torch.zeros(examples)), examples, loss)
    engine = GhostEngine(module)
    found = engine.clipped_sum(case.loss_function(), case.parameters(), case.batch, examples, clip_norm)
    total, norms, losses = oracle.clipped_sum(case, clip_norm)
    for name, expected in total.items():
        expected = expected.to_dense() if expected.is_sparse else expected
        torch.testing.assert_close(found.gradient[name], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.norms, torch.tensor(norms, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    return set(engine.handled.values())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_a_layer_with_a_rule(kind: type[nn.Module], examples: int, clip_norm: float) -> None:
    assert kind in LAYERS_OF, f"a rule without a test: add {kind.__name__} to tests/engines/layers_with_rules.py"
    for layer in LAYERS_OF[kind]:
        assert right_and_handled(layer, examples, clip_norm) == {kind.__name__}


@pytest.mark.parametrize("function", registry.FUNCTIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("examples", EXAMPLES)
@pytest.mark.parametrize("clip_norm", [0.1, 1e6])
def test_a_function_with_a_rule(function: Callable[..., Any], examples: int, clip_norm: float) -> None:
    assert function in CALLERS_OF, "a rule without a test: add the function to tests/engines/layers_with_rules.py"
    for layer in CALLERS_OF[function]:
        assert right_and_handled(layer, examples, clip_norm) == {"Calling, from within"}


def test_nothing_is_tested_that_has_no_rule() -> None:
    assert LAYERS_OF.keys() == set(KINDS)
    assert CALLERS_OF.keys() == registry.FUNCTIONS.keys()


class Overridden(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(2 * x, self.weight, self.bias)


class OverriddenWithin(nn.Conv1d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(2 * input, weight, bias)


def _replaced() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: F.linear(2 * x, layer.weight, layer.bias)
    return layer


@pytest.mark.parametrize(
    "layer",
    [
        Overridden(4, 3),
        OverriddenWithin(2, 3, 2),
        _replaced(),
        nn.Embedding(7, 3, max_norm=1.0),
        nn.Embedding(7, 3, scale_grad_by_freq=True),
        nn.InstanceNorm1d(3, affine=True, track_running_stats=True),
        type("OwnAxes", (nn.InstanceNorm1d,), {})(3, affine=True),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        nn.ConvTranspose1d(2, 3, 2),
        nn.EmbeddingBag(7, 3),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_what_a_rule_does_not_know_it_does_not_cover(layer: nn.Module) -> None:
    assert registry.rule_of(layer) is None


def test_a_subclass_that_inherits_the_forward_pass_has_the_rule() -> None:
    assert registry.rule_of(type("Head", (nn.Linear,), {})(4, 3)) is registry.LAYERS[nn.Linear]


@pytest.mark.parametrize("options", [{"kdim": 5}, {"vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_of_other_kinds_is_not_covered(options: dict[str, Any]) -> None:
    layer = nn.MultiheadAttention(6, 2, **options)
    assert registry.composite_rule_of(layer) is None
    assert registry.is_composite(layer)


def test_a_new_rule_is_one_decorated_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it the layer is handled per example, with it by the rule, and both are right."""
    monkeypatch.setattr(registry, "LAYERS", dict(registry.LAYERS))

    class Doubling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return 2 * torch.einsum("...d,pd->...p", x, self.weight)

    assert set(agree(*build(Doubling, 0, 3, 4)).handled.values()) == {"per example"}

    @registry.rule(Doubling)
    def doubling(layer: Doubling, x: Tensor) -> tuple[Operation, Tensor]:
        return Linear(), 2 * x

    assert set(agree(*build(Doubling, 0, 3, 4)).handled.values()) == {"Doubling"}
