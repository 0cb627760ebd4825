"""Correlated noise under verify and under the audit: right code passes, and planted mistakes are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_dp.mechanism.correlated as correlated_module
from lightning_dp import DifferentialPrivacy, verify
from lightning_dp.audit import audit
from lightning_dp.audit.decorrelated import decorrelated
from lightning_dp.audit.noise_law import Noised, noise_fault
from lightning_dp.mechanism.correlated import CorrelatedNoise, Past
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.state import NOTHING
from lightning_dp.plan.correlation import Correlation
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched

NOISE = ("banded", "lambda", "bisr")


def private(noise: str, **options: Any) -> DifferentialPrivacy:
    given: dict[str, Any] = {"noise_multiplier": 1.0, "sampling": "cyclic_poisson", "noise": noise, "noise_bands": 2}
    return DifferentialPrivacy(**{**given, **options})


@pytest.mark.parametrize("noise", NOISE)
def test_what_is_right_is_verified(noise: str) -> None:
    result = verify(trainer(private(noise)), regressor(), loader(), steps=3, examples=8)
    assert result.ok, str(result)


def releases(noise: CorrelatedNoise, steps: int = 4) -> list[Noised]:
    state, found = NOTHING, []
    for step in range(steps):
        total = torch.zeros(20_000)
        state = noise.add([(0, total)], 20_000, key=RandomKey.from_seed(1), step=step, state=state)
        found.append(Noised(step, {"w": total}, {"w": torch.ones(20_000)}, noise.noise_std))
    return found


def _alone(self: Past, like: Tensor, block: int) -> Any:
    """Noise that forgets the steps before."""
    return iter([next(original_terms(self, like, block))])


original_terms, original_normal = Past._terms, correlated_module.standard_normal
PLANTED: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "forgets the steps before": ((Past, "_terms", _alone),),
    "one draw for all steps": (
        (correlated_module, "standard_normal", lambda like, key, step, block: original_normal(like, key, 0, block)),
    ),
    "in units of another norm": ((Correlation, "column_norm", property(lambda self: 1.0)),),
}


@pytest.mark.parametrize("noise", NOISE)
def test_its_law_is_tested_after_it_is_taken_apart(noise: str) -> None:
    matrix = Correlation.found(noise, steps=4, momentum=0.9, groups=2, bands=3)
    right = releases(CorrelatedNoise(1.3, matrix))
    assert noise_fault(decorrelated(right, matrix)) is None
    assert noise_fault(right) is not None  # as it is, it is not independent
    for name, patches in PLANTED.items():
        if noise == "banded" and name != "one draw for all steps":
            continue  # which draws no terms, and has columns of length one as it is
        with patched(*patches):
            wrong = releases(CorrelatedNoise(1.3, matrix))
        assert noise_fault(decorrelated(wrong, matrix)) is not None, name


@pytest.mark.parametrize("noise", NOISE)
def test_the_lower_bound_stays_below_the_claim_and_finds_half_the_noise(noise: str) -> None:
    def audited(epsilon: float) -> Any:
        callback = private(noise, noise_multiplier=None, epsilon=epsilon, seed=0, engine="vmap", clip_norm=1.0)
        return audit(
            trainer(callback, max_steps=4), regressor(lr=0.1), loader(batch_size=32), gradient_canaries=2000,
            input_canaries=0, seed=0,
        )  # fmt: skip

    right = audited(4.0)
    assert right.verdict == "consistent"
    assert 0.5 < right.epsilon_lower < right.epsilon_claimed <= 4.0
    assert right.plan_p_value is None
    original: Callable[[CorrelatedNoise], float] = CorrelatedNoise._draw_std.fget
    with patched((CorrelatedNoise, "_draw_std", property(lambda self: original(self) / 4))):
        assert audited(1.0).verdict == "violated"
