"""An engine that gives wrong gradients is refused before training, or stops the run before the step is released."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines import ghost, vmap
from lightning_dp.engines.select import EngineError
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.step import engine_comparison
from tests.conftest import loader, regressor, trainer, weights

STEPS = 4
PLAIN = vmap.VmapEngine.clipped_sum


def fit(engine: Any, privacy: DifferentialPrivacy | None = None) -> Any:
    module = regressor()
    privacy = privacy or DifferentialPrivacy(noise_multiplier=1.0, engine=engine, seed=3)
    trainer(privacy, max_steps=STEPS).fit(module, loader())
    return module


def scaled(factor: float) -> Any:
    def clipped_sum(self: Any, *given: Any, **options: Any) -> Any:
        found = PLAIN(self, *given, **options)
        return replace(found, gradient={name: factor * one for name, one in found.gradient.items()})

    return clipped_sum


def none(self: Any, *given: Any, **options: Any) -> Any:
    raise RuntimeError("it cannot run this")


def unclipped(self: Any, loss: Any, parameters: Any, batch: Any, examples: int, _: Any, **options: Any) -> Any:
    return PLAIN(self, loss, parameters, batch, examples, torch.inf, **options)


def test_a_gradient_scaled_by_one_percent_is_refused_before_training(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(vmap.VmapEngine, "clipped_sum", scaled(1.01))
    with pytest.raises(EngineError, match=r"differ from those of plain backward passes"):
        fit("vmap")
    monkeypatch.setattr(ghost.GhostEngine, "clipped_sum", none)
    with caplog.at_level(logging.INFO):
        fit("auto")
    assert re.search(r"engine +loop: .*differ from those of plain backward passes", caplog.text, re.DOTALL)


@pytest.mark.parametrize("wrong", [scaled(1.5), unclipped])
def test_an_engine_that_becomes_wrong_stops_the_run_before_the_release(
    monkeypatch: pytest.MonkeyPatch, wrong: Any
) -> None:
    monkeypatch.setattr(engine_comparison, "compares_at", lambda key, step: True)
    module = regressor()
    privacy = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=0.01, engine="vmap", seed=3)

    def clipped_sum(self: Any, *given: Any, **options: Any) -> Any:
        one = PLAIN if module.global_step < 2 else wrong
        return one(self, *given, **options)

    monkeypatch.setattr(vmap.VmapEngine, "clipped_sum", clipped_sum)
    with pytest.raises(PreflightError, match=r"in step 2: expected the same"):
        trainer(privacy, max_steps=STEPS).fit(module, loader())
    assert module.global_step == 2
    assert privacy.ledger is not None
    assert privacy.ledger.steps == 2


@pytest.mark.parametrize("engine", ["ghost", "vmap"])
def test_weights_and_random_numbers_are_as_without_comparisons(monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    found = []
    for due in (True, False):
        monkeypatch.setattr(engine_comparison, "compares_at", lambda key, step, due=due: due)
        torch.manual_seed(7)
        module = fit(engine)
        logged = {name: one for name, one in module.trainer.callback_metrics.items() if name != "dp/data_wait"}
        found.append((weights(module), torch.rand(3), logged))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("times", [-1.0, 3.0])
def test_where_a_norm_is_at_c_rounding_may_say_otherwise_but_no_length_is_let_through(
    monkeypatch: pytest.MonkeyPatch, times: float
) -> None:
    """An engine that says of every example that its norm is on the other side of C, or says so three times as loudly."""
    monkeypatch.setattr(engine_comparison, "compares_at", lambda key, step: True)

    def clipped_sum(self: Any, *given: Any, **options: Any) -> Any:
        found = PLAIN(self, *given, **options)
        beside = {name: times * one for name, one in found.gradient.items() if name == INDICATOR}
        return replace(found, gradient={**found.gradient, **beside})

    monkeypatch.setattr(vmap.VmapEngine, "clipped_sum", clipped_sum)
    privacy = DifferentialPrivacy(
        noise_multiplier=1.0, clip_norm=0.01, engine="vmap", seed=3, clipping="quantile", quantile_weight=1.0
    )
    if times == -1.0:
        fit("vmap", privacy)
        return
    with pytest.raises(
        PreflightError, match=r"gives a clipped gradient of norm 0\.01\d*, and its norm is to be at most 0\.01"
    ):
        fit("vmap", privacy)
