"""The audit through the real Trainer: right code stays below its claim, planted bugs are found out.

Where an audit has no power, the law that finds the bug is named in the tests at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.audit import AuditResult, audit
from lightning_dp.audit.canaries import NOT_A_CANARY, Canaries, WithCanaries, let_in
from lightning_dp.audit.expected import plan_accuracy, plan_p_value
from lightning_dp.step.engine_comparison import EngineComparison
from tests.conftest import Regressor, loader, regression_data, regressor, trainer
from tests.guarantees import mutations
from tests.guarantees import mutations_outside as outside
from tests.mechanism.laws import plan


def audited(
    epsilon: float = 4.0, steps: int = 8, gradient: int = 3000, inputs: int = 20, seed: int = 0, **options: Any
) -> AuditResult:
    private = DifferentialPrivacy(**{"epsilon": epsilon, "delta": 1e-5, "seed": seed, "engine": "vmap", **options})
    return audit(
        trainer(private, max_steps=steps), regressor(lr=0.1), loader(batch_size=32),
        gradient_canaries=gradient, input_canaries=inputs, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "epsilon"), [("vmap", 1.0), ("vmap", 4.0), ("vmap", 8.0), ("loop", 4.0), ("auto", 4.0)]
)
def test_right_code_stays_below_its_claim(engine: str, epsilon: float) -> None:
    result = audited(epsilon, steps=4, gradient=100 if engine == "loop" else 2000, engine=engine)
    assert result.verdict == "consistent"
    assert 0 <= result.epsilon_lower < result.epsilon_claimed <= epsilon
    assert result.plan_p_value is not None
    assert result.plan_p_value > 1e-6
    if engine == "vmap" and epsilon > 1:
        assert result.epsilon_lower > 0.2 * epsilon  # the audit sees something at all


def test_a_filter_behind_the_release_tells_no_more_than_the_release() -> None:
    result = audited(4.0, steps=4, gradient=500, gradient_filter="disk")
    assert result.verdict == "consistent"
    assert 0 <= result.epsilon_lower < result.epsilon_claimed <= 4.0


@contextmanager
def unclipped_and_not_compared() -> Iterator[None]:
    """No clipping, where no comparison of the engine with plain backward passes is in the way."""
    with patch.object(EngineComparison, "is_due", False), mutations.no_clipping():
        yield


FOUND: dict[str, mutations.Mutation] = {
    "no noise": mutations.no_noise,
    "half the noise": lambda: mutations.noise_scaled(0.5),
    "no clipping": unclipped_and_not_compared,
    "the rank that adds noise does not": mutations.no_rank_adds_noise,
    "private gradient not used": mutations.private_gradient_made_but_not_used,
    "noise of another clip norm": mutations.noise_of_sigma_alone,
}


@pytest.mark.parametrize(
    ("bug", "epsilon"), [*[(bug, 4.0) for bug in FOUND], ("no noise", 8.0), ("half the noise", 8.0)]
)
def test_planted_bugs_are_found_out(bug: str, epsilon: float) -> None:
    with FOUND[bug]():
        result = audited(epsilon, steps=4, clip_norm=4.0)
    assert result.verdict == "violated"
    assert result.plan_p_value is not None
    assert result.plan_p_value < 1e-6


@pytest.mark.parametrize("bug", ["no noise", "no clipping", "half the noise"])
def test_the_lower_bound_alone_finds_them_out_at_a_small_epsilon(bug: str) -> None:
    """By the theorem alone, whatever the law of the noise should have been."""
    with FOUND[bug]():
        result = audited(epsilon=1.0, steps=2, gradient=20_000, inputs=0, expected_batch_size=64)
    assert result.epsilon_lower > result.epsilon_claimed


def test_shuffled_batches_accounted_as_poisson_samples_are_found_out() -> None:
    """Over one epoch of little noise, a Poisson sample misses a canary a third of the time, and shuffling never does."""
    right = audited(noise_multiplier=0.4, epsilon=None, steps=4, expected_batch_size=16)
    assert right.verdict == "consistent"
    with outside.every_example_once_an_epoch():
        wrong = audited(noise_multiplier=0.4, epsilon=None, steps=4, expected_batch_size=16)
    assert wrong.verdict == "violated"


@pytest.mark.parametrize("bug", [mutations.divisor_is_the_realised_batch, mutations.clipped_per_batch])
def test_what_an_audit_with_many_canaries_cannot_see(bug: mutations.Mutation) -> None:
    """Both shrink every canary the more canaries are drawn.

    The laws that see them are rows 2 and 9 of tests/guarantees; noise that is used again on resume is row 13, and a
    missing rank's noise among several processes row 7.
    """
    with bug():
        assert audited(epsilon=4.0, gradient=500).verdict == "consistent"


def test_a_single_canary_shows_a_divisor_that_is_the_realised_batch() -> None:
    """The distinguishing neighbour: with one example or none, the release does not shrink but stays at full size."""
    base = regression_data(1)
    moves = {}
    for name, bug in (("right", mutations.noise_scaled(1.0)), ("wrong", mutations.divisor_is_the_realised_batch())):
        with bug:
            module = regressor(lr=1.0)
            before = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
            private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=1e-3, expected_batch_size=50, dataset_size=50)
            trainer(private, max_steps=1).fit(module, loader(base, 1))
            moves[name] = float((torch.cat([p.detach().flatten() for p in module.parameters()]) - before).norm())
    assert moves["right"] == pytest.approx(1e-3 / 50, rel=1e-2)
    assert moves["wrong"] > 10 * moves["right"]  # C instead of C / B


def test_the_plan_is_that_of_the_data_without_canaries() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0)
    audit(trainer(private, max_steps=2), regressor(), loader(), gradient_canaries=50, input_canaries=4)
    assert private.plan is not None
    assert (private.plan.dataset_size, private.plan.expected_batch_size) == (64, 16)


def test_examples_are_looked_at_together_without_a_canary_among_them(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        audited(steps=1, gradient=100)
    assert "not whether a batch couples them" not in caplog.text

    class Coupled(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return super().training_step(batch, batch_idx) - 0.1 * self.net(batch[0]).var(correction=0)

    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1)
    with pytest.raises(PreflightError, match="training_step couples examples"):
        audit(fit, Coupled(), loader(), gradient_canaries=100, input_canaries=20)


def test_a_canary_in_company_is_refused() -> None:
    """Else the loss of several rows would be the canary's alone, or an example's."""
    module = regressor()
    module.__dict__["log"] = lambda *_: None
    let_in(module, 10)
    rows = torch.zeros(2, 4), torch.zeros(2)
    assert module.training_step((rows, torch.tensor([NOT_A_CANARY, NOT_A_CANARY])), 0).isfinite()
    with pytest.raises(ValueError, match="2 rows with a canary in an audit: expected one example, of 1"):
        module.training_step((rows, torch.tensor([NOT_A_CANARY, 3])), 0)


def test_input_canaries_that_are_memorised_are_recognised() -> None:
    """Without noise or clipping, the loss of a canary that was trained on falls further than that of one that was not."""
    result = audit(
        trainer(DifferentialPrivacy(noise_multiplier=0.0, clip_norm=float("inf"), seed=0), max_steps=300),
        regressor(hidden=64, lr=0.05), loader(regression_data(8), 8),
        gradient_canaries=0, input_canaries=20, seed=1,
    )  # fmt: skip
    (black_box,) = result.attacks
    assert black_box.correct >= 0.75 * black_box.guesses
    assert result.verdict == "consistent"  # nothing was claimed
    assert result.to_dict()["epsilon_claimed"] == "inf"


def test_the_dataset_holds_the_canaries_that_are_in_after_the_examples() -> None:
    canaries = Canaries(np.array([True, False, True]), np.array([False, True]), np.array([[0, 1], [2, 3]]))
    base = regression_data(5)
    dataset = WithCanaries(base, canaries)
    assert len(dataset) == 5 + 2 + 1
    assert [dataset[index][1] for index in range(8)] == [NOT_A_CANARY] * 5 + [1, 3, NOT_A_CANARY]
    inputs, target = dataset[7][0]
    assert torch.equal(inputs, base[2][0])
    assert torch.equal(target, base[3][1])


def test_the_expected_accuracy_is_that_of_the_gaussian_mechanism_at_full_batch() -> None:
    from scipy.stats import norm

    mechanism = plan(noise_multiplier=2.0, expected_batch_size=40)
    expected = norm.cdf(np.sqrt(9) / (2 * 2.0))
    assert expected < plan_accuracy(mechanism, steps=9) < expected + 0.04


def test_the_p_value_is_not_small_under_the_plan_and_small_without_noise() -> None:
    generator, mechanism = np.random.default_rng(3), plan(noise_multiplier=2.0, expected_batch_size=40)
    members = generator.random(4000) < 0.5
    scores = 3 * members - 1.5 + 2.0 * np.sqrt(9) / 2 * generator.standard_normal(4000)
    right = plan_p_value(scores * 3 / 4, members, mechanism, 9)
    assert right is not None
    assert right > 1e-6
    wrong = plan_p_value(members - 0.5, members, mechanism, 9)
    assert wrong is not None
    assert wrong < 1e-12


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradient_canaries": 1, "input_canaries": 1}, "at least two of one kind"),
        ({"gradient_canaries": -1}, "gradient_canaries=-1"),
        ({"confidence": 1.0}, "confidence=1.0"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        audit(trainer(DifferentialPrivacy(noise_multiplier=1.0)), regressor(), loader(), **options)


def test_a_run_without_privacy_claims_nothing_to_audit() -> None:
    with pytest.raises(ValueError, match="no DifferentialPrivacy among the Trainer's callbacks: expected one"):
        audit(trainer(), regressor(), loader())
