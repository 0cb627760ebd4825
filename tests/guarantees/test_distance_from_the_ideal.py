"""What a run does beside the mechanism that is composed is paid for. Each check fails when the bug is planted."""

from __future__ import annotations

from fractions import Fraction

import pytest

from tests.accounting import test_slack as slacks
from tests.guarantees import mutations_slack as mutations
from tests.guarantees.mutations import Mutation, caught
from tests.mechanism import test_grid as grids
from tests.training import test_cut_draws as cut_draws
from tests.training import test_secure as secure


@pytest.mark.parametrize("wrong", [mutations.cuts_are_free, mutations.cuts_move_an_example_by_no_more_than_others])
def test_cut_draws_are_paid_for(wrong: Mutation) -> None:
    slacks.test_cut_draws_stay_in_the_ledger_and_are_paid_for()
    with caught(wrong()):
        slacks.test_cut_draws_stay_in_the_ledger_and_are_paid_for()


@pytest.mark.parametrize("wrong", [mutations.draws_are_not_cut, mutations.each_rank_cuts_for_itself])
def test_the_bound_on_draws_is_kept(wrong: Mutation) -> None:
    cut_draws.test_the_bound_holds_over_all_ranks_together_and_for_each_micro_batch(2)
    with caught(wrong()):
        cut_draws.test_the_bound_holds_over_all_ranks_together_and_for_each_micro_batch(2)


def test_discrete_noise_is_paid_for() -> None:
    slacks.test_discrete_noise_is_paid_for_at_every_step()
    for wrong in (mutations.discrete_noise_is_free, mutations.slack_is_paid_for_once):
        with caught(wrong()):
            slacks.test_discrete_noise_is_paid_for_at_every_step()


@pytest.mark.parametrize(
    "wrong",
    [
        mutations.noise_is_drawn_in_floating_point,
        mutations.every_rank_adds_discrete_noise,
        mutations.one_ranks_noise_is_doubled,
        lambda: mutations.discrete_noise_scaled(Fraction(24, 25)),
    ],
)
def test_discrete_noise_has_its_law_once(wrong: Mutation) -> None:
    grids.noise_is_added_once_and_has_the_law(2)
    with caught(wrong()):
        grids.noise_is_added_once_and_has_the_law(2)


@pytest.mark.parametrize("wrong", [mutations.noise_is_drawn_in_floating_point, mutations.one_ranks_noise_is_doubled])
def test_discrete_noise_reaches_the_optimizer_of_a_run(wrong: Mutation) -> None:
    secure.noise_of_a_run_has_the_law()
    with caught(wrong()):
        secure.noise_of_a_run_has_the_law()


@pytest.mark.parametrize("wrong", [mutations.rounding_comes_before_clipping, mutations.rounding_is_to_the_nearest])
def test_the_sensitivity_is_that_of_the_integers(wrong: Mutation) -> None:
    grids.no_gradient_is_longer_than_the_clip_norm()
    with caught(wrong()):
        grids.no_gradient_is_longer_than_the_clip_norm()


def test_every_example_is_rounded_before_anything_is_added() -> None:
    grids.removing_an_example_takes_exactly_its_integers()
    with caught(mutations.the_sum_is_rounded_and_not_the_examples()):
        grids.removing_an_example_takes_exactly_its_integers()
