"""Standardised weights are recognised once, taken by their values afterwards, and found anew when those are others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost import reparametrised as interception
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.contribution import Written
from lightning_dp.engines.ghost.standardisation import Recognised
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.models.weight_standardisation import WSConv2d
from lightning_dp.plan.clipping import Clipping
from tests.engines.against_loop import STYLES, build, same
from tests.engines.test_ghost_projection import OTHERS, PROJECTIONS, Weight, standardised

KNOWN: dict[str, Weight] = {
    "weight standardisation": standardised,
    "… of another length": lambda v, gain: -1.7 * standardised(v, gain),
    "… without a gain": lambda v, gain: standardised(v, torch.ones_like(gain)),
}
UNKNOWN = {
    "a gain with an offset": lambda v, gain: standardised(v, gain + 1),
    **OTHERS,
    **{name: PROJECTIONS[name] for name in PROJECTIONS if name != "weight standardisation"},
}


def drawn(weight: Weight, dtype: torch.dtype, seed: int) -> tuple[Tensor, dict[str, Tensor], Callable[..., Any]]:
    generator = torch.Generator().manual_seed(seed)
    v = (0.3 + torch.randn(5, 3, 12, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    gain = 1 + torch.rand(5, 1, 1, generator=generator, dtype=torch.float64)
    gain[1] *= -1
    gain = gain.to(dtype).requires_grad_()
    w = weight(v, gain)

    def back(gradients: Tensor, batched: bool) -> dict[str, Tensor]:
        found = torch.autograd.grad(w, [v, gain], gradients, True, allow_unused=True, is_grads_batched=batched)
        return {name: g for name, g in zip(("v", "gain"), found, strict=True) if g is not None}

    return w.detach(), {"v": v.detach(), "gain": gain.detach()}, back


class AskedError(Exception):
    """A direction was sent back through autograd."""


def nobody(*_: Any) -> NoReturn:
    raise AskedError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", KNOWN)
def test_the_formula_gives_the_whole_way_back_without_autograd(name: str, dtype: torch.dtype) -> None:
    recognised, buffers = Recognised(), Buffers()
    recognised.projection(*drawn(KNOWN[name], dtype, 0), buffers)
    weight, parameters, back = drawn(KNOWN[name], dtype, 1)  # v and the gain have moved since
    projection = recognised.projection(weight, parameters, nobody, buffers)
    assert projection is not None
    generator = torch.Generator().manual_seed(2)
    gradients = torch.randn(4, *weight.shape, generator=generator, dtype=torch.float64).to(dtype)
    factors = torch.rand(4, generator=generator, dtype=torch.float64).to(dtype)
    shares = projection.contributions(Written(gradients), {n: p.shape for n, p in parameters.items()})
    expected = back(gradients, True)
    assert shares.keys() == expected.keys()
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for parameter, rows in expected.items():
        share = shares[parameter]
        torch.testing.assert_close(share.norms().values, rows.flatten(1).norm(dim=1), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(share.rows(), rows, rtol=tolerance, atol=tolerance)
        weighted = torch.einsum("b,b...->...", factors, rows)
        torch.testing.assert_close(share.weighted_sum(factors), weighted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_no_standardisation_is_asked_about_every_time(name: str, dtype: torch.dtype) -> None:
    recognised, buffers = Recognised(), Buffers()
    recognised.projection(*drawn(UNKNOWN[name], dtype, 0), buffers)
    weight, parameters, _ = drawn(UNKNOWN[name], dtype, 1)
    constant = name == "a constant channel"  # no direction is worth sending
    with pytest.raises(AskedError) if not constant else torch.no_grad():
        recognised.projection(weight, parameters, nobody, buffers)


@pytest.mark.parametrize("later", [*UNKNOWN, "standardised, with another length"])
def test_a_weight_that_is_computed_otherwise_later_is_found_anew(later: str) -> None:
    recognised, buffers = Recognised(), Buffers()
    recognised.projection(*drawn(standardised, torch.float32, 0), buffers)
    other: Weight = UNKNOWN.get(later, lambda v, gain: 1.01 * standardised(v, gain))
    weight, parameters, _ = drawn(other, torch.float32, 1)
    constant = later == "a constant channel"
    with pytest.raises(AskedError) if not constant else torch.no_grad():
        assert recognised.projection(weight, parameters, nobody, buffers) is None


@pytest.mark.parametrize("outside", [1.0, 1e-2, 1e-3, 1e-4])
def test_a_norm_from_the_formula_is_never_short_however_much_of_a_gradient_drops_out(outside: float) -> None:
    recognised, buffers = Recognised(), Buffers()
    recognised.projection(*drawn(standardised, torch.float32, 0), buffers)
    weight, parameters, _ = drawn(standardised, torch.float32, 1)
    projection = recognised.projection(weight, parameters, nobody, buffers)
    assert projection is not None
    generator = torch.Generator().manual_seed(3)
    along = torch.randn(50, 5, 1, 1, generator=generator) + weight * torch.randn(50, 5, 1, 1, generator=generator)
    gradients = along + outside * torch.randn(50, *weight.shape, generator=generator)
    exact = drawn(standardised, torch.float64, 1)[2](gradients.double(), True)["v"].flatten(1).norm(dim=1)
    norms = projection.contributions(Written(gradients), {"v": weight.shape, "gain": parameters["gain"].shape})
    assert bool((norms["v"].norms().values >= exact * (1 - 1e-6)).all())


def test_one_engine_over_several_micro_batches_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters move, one channel's gain becomes zero, one channel's clamp becomes active: always what the loop gives."""
    asked: list[int] = []
    usual = interception.Recognised.projection

    def projection(self: Recognised, weight: Tensor, parameters: Any, way_back: Any, buffers: Buffers) -> Any:
        def back(gradients: Tensor, batched: bool) -> Any:
            asked.append(len(gradients))
            return way_back(gradients, batched)

        return usual(self, weight, parameters, back, buffers)

    monkeypatch.setattr(interception.Recognised, "projection", projection)
    module, _ = build(lambda: nn.Sequential(WSConv2d(2, 4, 3, 2, 1), nn.GELU(), WSConv2d(4, 6, 3, groups=2)), 0, 1)
    engine, parameters = GhostEngine(module), dict(module.named_parameters())

    def loss_function(given: Mapping[str, Tensor], images: Tensor) -> tuple[Tensor, Any]:
        output = functional_call(module, dict(given), (images,))
        return torch.sin(output).pow(2).mean(), {"output": output}

    def check(seed: int) -> int:
        asked.clear()
        images = torch.randn(3, 2, 9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        run = (loss_function, parameters, images, 3, Clipping(0.3, STYLES[seed % len(STYLES)]))
        same(engine.clipped_sum(*run), LoopEngine().clipped_sum(*run))
        return len(asked)

    assert check(0) > 0, "two new layers"
    for seed in range(1, 4):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter += 0.1 * torch.randn(
                    parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
                )
        assert check(seed) == 0, "no direction is sent back for a layer that is known"
    with torch.no_grad():
        parameters["0.gain"][1] = 0.0
    check(4)
    with torch.no_grad():
        parameters["2.weight"][2] *= 1e-5
    assert check(5) > 0, "a channel whose clamp is active is no longer of that kind"
