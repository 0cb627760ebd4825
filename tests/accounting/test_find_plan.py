from __future__ import annotations

import doctest
from typing import Any

import pytest

import lightning_dp.accounting.find_plan as module
from lightning_dp.accounting import Ledger
from lightning_dp.accounting.find_plan import Known, Wanted, before_noise, find_plan
from lightning_dp.errors import PreflightError
from lightning_dp.plan.clipping import Clipping
from lightning_dp.plan.privacy_plan import PrivacyPlan


def wanted(**changes: Any) -> Wanted:
    numbers: dict[str, Any] = {"epsilon": 2.0, "delta": 1e-5, "clipping": Clipping(0.5, "automatic", 0.03)}
    return Wanted(**{**numbers, **changes})


def known(**changes: Any) -> Known:
    return Known(**{"length": 1000, "batch_size": 25, "remaining_steps": 40, "ranks": 4, **changes})


def spent(plan: PrivacyPlan, steps: int) -> dict[str, Any]:
    ledger = Ledger(plan)
    for _ in range(steps):
        ledger.charge()
    return ledger.state_dict()


def test_every_number_of_the_plan_is_one_that_was_asked_for_or_is_known() -> None:
    plan = find_plan(wanted(noise_multiplier=1.5, max_batch_size=400, resolution=2**20, coordinates=7), known())
    assert plan == PrivacyPlan(
        noise_multiplier=1.5, clip_norm=0.5, clipping="automatic", automatic_gamma=0.03, delta=1e-5, dataset_size=1000,
        expected_batch_size=100, steps=40, target_epsilon=2.0, max_batch_size=400, resolution=2**20, coordinates=7,
    )  # fmt: skip


def test_numbers_asked_for_go_before_those_of_the_loader() -> None:
    plan = before_noise(wanted(expected_batch_size=64, dataset_size=1200), known(unit="user_id"), None)
    assert (plan.expected_batch_size, plan.dataset_size, plan.unit) == (64, 1200, "user_id")


@pytest.mark.parametrize("max_batch_size", [None, 160])
def test_the_noise_found_keeps_all_planned_steps_within_the_target_and_no_more(max_batch_size: int | None) -> None:
    plan = find_plan(wanted(max_batch_size=max_batch_size), known())
    assert 0.99 * 2.0 < Ledger(plan).epsilon(40).epsilon <= 2.0


def test_steps_that_are_spent_count_among_those_planned() -> None:
    before = find_plan(wanted(), known(remaining_steps=100))
    same = find_plan(wanted(), known(remaining_steps=60), spent(before, 40))
    assert same == before  # it goes on as it was
    other = find_plan(wanted(expected_batch_size=150), known(remaining_steps=10), spent(before, 40))
    assert other.steps == 50
    assert 0.99 * 2.0 < Ledger.resume(other, spent(before, 40)).epsilon(50).epsilon <= 2.0


def test_where_no_step_is_left_the_noise_is_that_of_the_steps_before() -> None:
    before = find_plan(wanted(), known())
    plan = find_plan(wanted(expected_batch_size=150), known(remaining_steps=0), spent(before, 40))
    assert (plan.steps, plan.noise_multiplier) == (40, before.noise_multiplier)


def test_without_an_end_the_noise_can_be_given_but_not_found() -> None:
    assert find_plan(wanted(epsilon=None, noise_multiplier=1.0), known(remaining_steps=None)).steps is None
    with pytest.raises(PreflightError, match=r"^epsilon=2.0 without an end: expected Trainer\(max_steps="):
        find_plan(wanted(), known(remaining_steps=None))


@pytest.mark.parametrize(
    ("asked", "found", "text"),
    [
        ({}, {"batch_size": 300}, r"batch_size=300 on each of 4 ranks with 1000 examples: expected at\s+most 250"),
        ({}, {"batch_size": 300, "unit": "user"}, r"1000 users: expected at most 250"),
        ({}, {"batch_size": 1001, "ranks": 1}, r"batch_size=1001 with 1000 examples: expected at\s+most 1000"),
        (
            {"max_batch_size": 300, "dataset_size": 900},
            {},
            "dataset_size=900 with max_batch_size=300: expected at least",
        ),
    ],
)
def test_sizes_that_do_not_go_together_are_refused(asked: dict[str, Any], found: dict[str, Any], text: str) -> None:
    with pytest.raises(PreflightError, match=text):
        before_noise(wanted(**asked), known(**found), None)


def test_a_bound_on_draws_that_the_budget_cannot_pay_for_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_batch_size=110 with an expected batch size of 100: expected at least"):
        find_plan(wanted(max_batch_size=110, sampling="random_allocation"), known())
    assert (
        find_plan(wanted(max_batch_size=110), known()).noise_multiplier > find_plan(wanted(), known()).noise_multiplier
    )


def test_the_examples_of_the_documentation_hold() -> None:
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
