"""What an accelerator is asked later changes no sum: a micro-batch with another answer than the usual is computed once more."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dp.engines import accumulate as accumulate_module
from lightning_dp.engines.accumulate import Accumulated, accumulate
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine
from lightning_dp.mechanism.put_off import ASKED_AT_ONCE, is_so, put_off
from lightning_dp.models.weight_standardisation import WSConv2d
from lightning_dp.plan.clipping import Clipping
from tests.engines.against_loop import STYLES

HUGE, BROKEN = 1e30, torch.nan


@pytest.fixture
def _as_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.mechanism.put_off.ASKED_AT_ONCE", ASKED_AT_ONCE - {"cpu"})


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = WSConv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.second, self.head = WSConv2d(8, 8, 3, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        images, scale = x[:, :2], x[:, 2:].mean((1, 2, 3))
        hidden = self.second(torch.tanh(self.norm(self.first(images)))).tanh().mean((2, 3))
        return torch.sin(self.head(hidden)) * scale[:, None]  # an example's scale is that of its gradient


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def examples(count: int, scales: Mapping[int, float], seed: int) -> Tensor:
    images = torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    images[:, 2] = 1.0
    for index, scale in scales.items():
        images[index, 2] = scale
    return images


def summed(engine: Engine, module: Net, micro_batches: list[Tensor], clipping: Clipping | float = 1.0) -> Accumulated:
    def loss_function(parameters: Mapping[str, Tensor], batch: Tensor) -> tuple[Tensor, Any]:
        output = functional_call(module, dict(parameters), (batch,))
        return output.sum(), {"output": output}

    given = [(one, len(one)) for one in micro_batches]
    return accumulate(engine, loss_function, dict(module.named_parameters()), given, clipping)


def same(found: Accumulated, expected: Accumulated) -> None:
    for name, gradient in expected.gradient.items():
        torch.testing.assert_close(
            found.gradient[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
    for mine, theirs in ((found.norms, expected.norms), (found.losses, expected.losses)):
        torch.testing.assert_close(torch.cat(mine), torch.cat(theirs), rtol=1e-4, atol=1e-5, equal_nan=True)
    assert found.not_finite == expected.not_finite


ODD = [{}, {1: HUGE}, {0: BROKEN, 2: 1e-3}, {}, {3: torch.inf}]


@pytest.mark.usefixtures("_as_on_an_accelerator")
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("make", [GhostEngine, lambda _: VmapEngine()], ids=["ghost", "vmap"])
def test_sums_are_those_of_the_loop_whatever_the_examples_are(make: Any, style: Any) -> None:
    module = net()
    batches = [examples(4, scales, seed) for seed, scales in enumerate(ODD)]
    expected = summed(LoopEngine(), module, batches, Clipping(1.0, style))
    same(summed(make(module), module, batches, Clipping(1.0, style)), expected)
    assert expected.not_finite == 2


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_only_a_micro_batch_with_another_answer_is_computed_again_and_the_next_one_is_queued_first() -> None:
    module, engine = net(), GhostEngine(net())
    engine = GhostEngine(module)
    batches = [examples(4, scales, seed) for seed, scales in enumerate(ODD)]
    order: list[int] = []
    usual = engine.clipped_sum

    def noting(loss: Any, parameters: Any, batch: Tensor, *args: Any, **options: Any) -> Any:
        order.append(next(index for index, one in enumerate(batches) if one is batch))
        return usual(loss, parameters, batch, *args, **options)

    engine.clipped_sum = noting
    summed(engine, module, batches)
    assert order == [0, 1, 2, 1, 3, 2, 4, 4]


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_whoever_does_not_look_at_the_answers_releases_what_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accumulate_module, "Answer", lambda flags: False)
    module = net()
    found = summed(GhostEngine(module), module, [examples(4, {0: BROKEN}, 0)])
    assert not all(bool(torch.isfinite(one).all()) for one in found.gradient.values())


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_a_weight_that_is_standardised_otherwise_later_is_found_anew() -> None:
    module = net()
    engine, batches = GhostEngine(module), [examples(4, {}, 0)]
    same(summed(engine, module, batches), summed(LoopEngine(), module, batches))
    with torch.no_grad():
        module.second.weight[2] *= 1e-5  # the clamp of this channel is active from now on
    same(summed(engine, module, batches), summed(LoopEngine(), module, batches))


@pytest.mark.usefixtures("_as_on_an_accelerator")
def test_hooks_in_autograds_own_thread_put_off_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator the backward pass runs in another thread, which knows nothing of this one's context."""
    usual = GhostEngine._backward

    def elsewhere(*args: Any) -> None:
        thread = threading.Thread(target=usual, args=args)
        thread.start()
        thread.join()

    monkeypatch.setattr(GhostEngine, "_backward", elsewhere)
    asked: list[Tensor] = []
    monkeypatch.setattr(Tensor, "__bool__", lambda flag: asked.append(flag) or flag.item() != 0)
    module = net()
    engine, batch = GhostEngine(module), examples(4, {}, 0)
    for expected_flags in (None, 3):  # two layers, and the norms; the first pass has to recognise the layers
        asked.clear()
        with put_off() as flags:
            engine.clipped_sum(
                lambda p, x: (functional_call(module, dict(p), (x,)).sum(), []),
                dict(module.named_parameters()),
                batch,
                4,
                1.0,
            )
        if expected_flags is not None:
            assert len(flags) >= expected_flags
            assert asked == []


def test_where_an_answer_costs_nothing_it_is_asked_for_at_once() -> None:
    with put_off() as flags:
        assert is_so(torch.tensor(True))
        assert not is_so(torch.tensor(False))
    assert flags == []
    assert is_so(torch.tensor(True))
