"""Runs of every kind, audited: right code stays below its claim, the audit sees something, and half the noise is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import pytest
from scipy import stats

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage
from lightning_dp.audit import AuditResult, audit
from lightning_dp.audit.canaries import Canaries, WithCanaries
from lightning_dp.audit.observer import mean_of
from lightning_dp.step.sample_release import of_part
from tests.conftest import Regressor, loader, regression_data, regressor, sample_of, trainer
from tests.guarantees import mutations
from tests.mechanism.laws import plan
from tests.ranks.ranks import Shift
from tests.training.manual_modules import Gan, ManualRegressor


def audited(
    module: L.LightningModule, *callbacks: Any, inputs: int = 0, seed: int = 0, steps: int = 4, **options: Any
) -> AuditResult:
    private = DifferentialPrivacy(**{"epsilon": 4.0, "delta": 1e-5, "seed": seed, "engine": "vmap", **options})
    return audit(
        trainer(private, *callbacks, max_steps=steps), module, loader(batch_size=32),
        gradient_canaries=1500, input_canaries=inputs, seed=seed,
    )  # fmt: skip


KINDS: dict[str, Callable[[], AuditResult]] = {
    "manual optimization": lambda: audited(ManualRegressor(lr=0.1)),
    "two private optimizers": lambda: audited(Gan(lr=0.1), steps=8, seed=1),
    "average of the weights": lambda: audited(regressor(lr=0.1), ExponentialMovingAverage(decay=0.9), inputs=20),
    "views": lambda: audited(regressor(lr=0.1), AugmentationMultiplicity(k=2, transform=Shift(), images=0), inputs=20),
    "users": lambda: audited(
        regressor(lr=0.1), privacy_unit=[index // 2 for index in range(64)], expected_batch_size=16, inputs=20
    ),
    "adapted clip norm": lambda: audited(regressor(lr=0.1), clipping="quantile"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_right_code_stays_below_its_claim_and_half_the_noise_is_found(kind: str) -> None:
    right = KINDS[kind]()
    assert right.verdict == "consistent", right
    seen, most = right.bound("plan_law"), right.bound("curve")
    assert seen is not None
    assert most is not None
    assert 0.7 * right.epsilon_claimed < seen < 1.2 * right.epsilon_claimed
    assert 0.2 * right.epsilon_claimed < right.epsilon_lower < most < right.epsilon_claimed <= 4.0
    with mutations.noise_scaled(0.5):
        assert KINDS[kind]().verdict == "violated"


def test_of_several_releases_of_a_sample_their_mean_counts_with_the_noise_that_it_has() -> None:
    """Each of m releases has σ√m; what one of them says, or all, is what Gaussians with that noise say."""
    one = plan(noise_multiplier=1.5).mechanism
    part, released = of_part(one, 2), np.array([0.3, -0.1])
    both, noise = mean_of([(released, part), (3 * released, part)])
    assert both == pytest.approx(2 * released)
    assert noise.noise.noise_multiplier == pytest.approx(1.5)
    alone, noise = mean_of([(released, part)])
    assert alone == pytest.approx(released)
    assert noise.noise.noise_multiplier == pytest.approx(1.5 * np.sqrt(2))


def test_a_public_optimizer_shows_nothing() -> None:
    result = audited(Gan(lr=0.1), public_optimizers=[0])
    assert result.verdict == "consistent", result
    assert result.epsilon_lower > 0.2 * result.epsilon_claimed


def test_input_canaries_under_manual_optimization_are_refused() -> None:
    with pytest.raises(ValueError, match="input_canaries=20 with manual optimization: expected 0"):
        audited(ManualRegressor(lr=0.1), inputs=20)


def test_coins_are_independent_and_fair() -> None:
    """The pitfall of exactly half of the canaries: then the last coin follows from the others, and no theorem holds."""
    counts = [int(Canaries.draw(np.random.default_rng(seed), 400, 0, 10).gradient.sum()) for seed in range(400)]
    assert np.var(counts) == pytest.approx(100, rel=0.4)
    assert np.mean(counts) == pytest.approx(200, abs=5 * 10 / 20)


def test_canaries_are_drawn_like_examples_and_once_for_each_coin() -> None:
    """The pitfall of canaries in every batch, or twice in the data: another mechanism than the claimed one is audited."""
    canaries = Canaries.draw(np.random.default_rng(0), 50, 6, 64)
    numbers = [WithCanaries(regression_data(), canaries)[at][1] for at in range(64 + int(canaries.gradient.sum()))]
    assert sorted(numbers)[64:] == list(np.flatnonzero(canaries.gradient) + 1)
    seen: list[int] = []

    class Watched(Regressor):
        def on_train_batch_start(self, *_: object) -> None:
            seen.append(len(sample_of(self.trainer).indices))

    audit(
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=1, expected_batch_size=8), max_steps=30), Watched(),
        loader(batch_size=8), gradient_canaries=400, input_canaries=0, seed=0,
    )  # fmt: skip
    there = 64 + int(Canaries.draw(np.random.default_rng(0), 400, 0, 64).gradient.sum())
    assert stats.binomtest(sum(seen), 30 * there, 8 / 64).pvalue > 1e-6
