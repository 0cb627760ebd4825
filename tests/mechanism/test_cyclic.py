"""Cyclic Poisson sampling: who may be drawn when, how often, and independently of whom."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightning_dp.mechanism.cyclic import cyclic_poisson_sample, groups_of
from lightning_dp.mechanism.randomness import RandomKey
from tests.guarantees.mutations import caught, patched
from tests.mechanism.laws import FALSE_ALARM, poisson_sampling_p_values

KEY, EXAMPLES, GROUPS, PROBABILITY = RandomKey.from_seed(0), 40, 3, 0.4


def draws(steps: int) -> npt.NDArray[np.bool_]:
    groups = groups_of(KEY, EXAMPLES, GROUPS)
    members = np.zeros((steps, EXAMPLES), dtype=bool)
    for step in range(steps):
        members[step, cyclic_poisson_sample(KEY, groups, step, PROBABILITY)] = True
    return members


def test_two_participations_of_an_example_are_a_multiple_of_the_groups_apart() -> None:
    for example in draws(600).T:
        assert len(set(np.flatnonzero(example) % GROUPS)) <= 1


def test_in_the_turns_of_its_group_an_example_is_drawn_by_coins_of_its_own() -> None:
    members = draws(9000)
    for group, examples in enumerate(groups_of(KEY, EXAMPLES, GROUPS)):
        p_values = poisson_sampling_p_values(members[group::GROUPS][:, examples], PROBABILITY)
        assert min(p_values.values()) > FALSE_ALARM, (group, p_values)


def test_groups_are_drawn_for_each_example_alone_so_that_neighbours_have_the_same() -> None:
    whole, less = groups_of(KEY, EXAMPLES + 1, GROUPS), groups_of(KEY, EXAMPLES, GROUPS)
    for one, other in zip(whole, less, strict=True):
        assert np.array_equal(one[one < EXAMPLES], other)


def test_groups_are_as_large_as_coins_make_them_and_another_key_makes_others() -> None:
    sizes = [len(group) for group in groups_of(KEY, 90_000, GROUPS)]
    assert float(stats.chisquare(sizes).pvalue) > FALSE_ALARM
    mine, others = groups_of(KEY, 900, GROUPS), groups_of(RandomKey.from_seed(1), 900, GROUPS)
    shared = sum(len(np.intersect1d(one, other)) for one, other in zip(mine, others, strict=True))
    assert 200 < shared < 400  # a third of them


def test_no_example_at_all_and_more_groups_than_examples() -> None:
    assert [len(group) for group in groups_of(KEY, 0, 2)] == [0, 0]
    assert sum(len(group) for group in groups_of(KEY, 2, 5)) == 2
    assert len(cyclic_poisson_sample(KEY, groups_of(KEY, 0, 2), 1, 1.0)) == 0


def test_planted_draws_from_all_groups_are_caught() -> None:
    here = sys.modules[__name__]
    with caught(patched((here, "groups_of", lambda key, examples, groups: [np.arange(examples)] * groups))):
        test_two_participations_of_an_example_are_a_multiple_of_the_groups_apart()
