"""What a run does beside the mechanism that is composed is paid for. Each check fails when the bug is planted."""

from __future__ import annotations

import pytest

from tests.accounting import test_distance as distances
from tests.guarantees import mutations_distance as mutations
from tests.guarantees.mutations import Mutation, caught
from tests.training import test_cut_draws as cut_draws


@pytest.mark.parametrize("wrong", [mutations.cuts_are_free, mutations.cuts_are_paid_for_once])
def test_cut_draws_are_paid_for(wrong: Mutation) -> None:
    distances.test_the_distances_of_phases_add_up_and_stay_in_the_ledger()
    with caught(wrong()):
        distances.test_the_distances_of_phases_add_up_and_stay_in_the_ledger()


@pytest.mark.parametrize("wrong", [mutations.draws_are_not_cut, mutations.each_rank_cuts_for_itself])
def test_the_bound_on_draws_is_kept(wrong: Mutation) -> None:
    cut_draws.test_the_bound_holds_over_all_ranks_together_and_for_each_micro_batch(2)
    with caught(wrong()):
        cut_draws.test_the_bound_holds_over_all_ranks_together_and_for_each_micro_batch(2)
