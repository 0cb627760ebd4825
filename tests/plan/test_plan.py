from __future__ import annotations

import dataclasses
import doctest
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lightning_dp.plan.privacy_plan
from lightning_dp.plan.clipping import check_clip_norm
from lightning_dp.plan.mechanism import check_noise_multiplier
from lightning_dp.plan.privacy_plan import PrivacyPlan, check_delta, check_epsilon
from lightning_dp.plan.sampling import check_sampling_probability

GOOD: dict[str, Any] = {
    "noise_multiplier": 2.0,
    "clip_norm": 0.5,
    "delta": 1e-5,
    "dataset_size": 1000,
    "expected_batch_size": 96,
    "steps": 50,
    "target_epsilon": 3.0,
}
NOT_POSITIVE = [0.0, -1.0, -math.inf, math.nan]
NEVER = [math.nan, math.inf, -math.inf, -1.0]
OUTSIDE_0_1 = [0.0, 1.0, -1e-9, 2.0, math.nan, math.inf]

BAD: list[tuple[str, Any, str, str]] = [
    *(("noise_multiplier", value, "expected a finite number of at least 0", "such as 1.0") for value in NEVER),
    *(("clip_norm", value, "expected a number above 0", "such as 1.0") for value in NOT_POSITIVE),
    *(
        ("delta", value, r"expected a number in \(0, 1\), well below 1 / dataset_size", "such as 1e-5")
        for value in OUTSIDE_0_1
    ),
    *(("target_epsilon", value, "expected a finite number above 0", "such as 8.0") for value in [*NEVER, 0.0]),
    *(("dataset_size", value, "expected at least one example", "Check that the training dataset") for value in [0, -5]),
    *(
        (
            "expected_batch_size",
            value,
            r"expected a value in\s+\(0, 1\]",
            r"DifferentialPrivacy\(expected_batch_size=...\)",
        )
        for value in [0, -1, 1000.5, 4096, math.nan, math.inf]
    ),
    ("steps", -1, "expected a non-negative number of steps", "None if unknown"),
]


@pytest.mark.parametrize(("field", "value", "expectation", "remedy"), BAD)
def test_a_bad_field_is_refused_with_its_value_the_expectation_and_the_remedy(
    field: str, value: Any, expectation: str, remedy: str
) -> None:
    name = "epsilon" if field == "target_epsilon" else field
    with pytest.raises(ValueError, match=rf"(?s){name}={value}\b.*{expectation}.*{remedy}"):
        PrivacyPlan(**{**GOOD, field: value})


@pytest.mark.parametrize("field", ["noise_multiplier", "clip_norm", "delta", "dataset_size", "expected_batch_size"])
def test_the_fields_of_the_mechanism_have_no_default(field: str) -> None:
    with pytest.raises(TypeError, match=field):
        PrivacyPlan(**{name: value for name, value in GOOD.items() if name != field})


def test_fields_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        PrivacyPlan(2.0, 0.5, 1e-5, 1000, 96)


def test_no_clip_norm_is_refused_with_noise_and_accepted_without() -> None:
    with pytest.raises(
        ValueError, match=r"clip_norm=inf with noise_multiplier=2.0: .*Give a finite clip_norm, or noise_multiplier=0"
    ):
        PrivacyPlan(**{**GOOD, "clip_norm": math.inf})
    free = PrivacyPlan(**{**GOOD, "clip_norm": math.inf, "noise_multiplier": 0.0})
    assert free.noise_std == 0.0  # not the NaN that 0 · ∞ is


@given(
    noise_multiplier=st.just(0.0) | st.floats(1e-9, 1e6),
    clip_norm=st.floats(1e-6, 1e6),
    dataset_size=st.integers(1, 10**9),
    fraction=st.floats(1e-6, 1.0),
)
def test_derived_numbers_follow_from_the_fields(
    noise_multiplier: float, clip_norm: float, dataset_size: int, fraction: float
) -> None:
    expected = min(fraction * dataset_size, dataset_size)
    plan = PrivacyPlan(**{**GOOD, "noise_multiplier": noise_multiplier, "clip_norm": clip_norm,
                          "dataset_size": dataset_size, "expected_batch_size": expected})  # fmt: skip
    assert plan.sampling_probability * dataset_size == pytest.approx(expected)
    assert 0 < plan.sampling_probability <= 1
    assert math.isclose(plan.noise_std, noise_multiplier * clip_norm, rel_tol=1e-12)


def test_everything_in_every_step_is_a_valid_plan() -> None:
    plan = PrivacyPlan(**{**GOOD, "expected_batch_size": 1000})
    assert plan.sampling_probability == 1.0


def test_a_plan_does_not_change() -> None:
    plan = PrivacyPlan(**GOOD)
    for field in dataclasses.fields(plan):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(plan, field.name, 1)
    assert pickle.loads(pickle.dumps(plan)) == plan == dataclasses.replace(plan)
    assert hash(plan) == hash(PrivacyPlan(**GOOD))
    with pytest.raises(ValueError, match="delta=7"):
        dataclasses.replace(plan, delta=7)


CHECKS: list[tuple[Callable[[float], None], str, list[float], list[float]]] = [
    (check_epsilon, "epsilon", [1e-9, 8.0, 1e9], [*NEVER, 0.0]),
    (check_delta, "delta", [1e-300, 1e-5, 0.999], OUTSIDE_0_1),
    (check_clip_norm, "clip_norm", [1e-9, 1.0, math.inf], NOT_POSITIVE),
    (check_noise_multiplier, "noise_multiplier", [0.0, 1e-9, 1e9], NEVER),
    (check_sampling_probability, "sampling_probability", [1e-12, 0.5, 1.0], [0.0, -0.1, 1.0000001, math.nan, math.inf]),
]


@pytest.mark.parametrize(("check", "name", "good", "bad"), CHECKS)
def test_a_check_accepts_the_range_it_names_and_nothing_else(
    check: Callable[[float], None], name: str, good: list[float], bad: list[float]
) -> None:
    for value in good:
        check(value)
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name}={value}\b.*expected a .*number"):
            check(value)


def test_the_examples_of_the_documentation_hold() -> None:
    results = doctest.testmod(lightning_dp.plan.privacy_plan)
    assert results.attempted > 0
    assert results.failed == 0
