from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample, rank_slice
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, poisson_sampling_p_values

N, Q, DRAWS = 60, 0.15, 12_000
Sampler = Callable[[np.random.Generator, int, float], npt.NDArray[np.int64]]


def memberships(sampler: Sampler, examples: int = N, q: float = Q, draws: int = DRAWS) -> npt.NDArray[np.bool_]:
    key, members = RandomKey.from_seed(11), np.zeros((draws, examples), dtype=bool)
    for step in range(draws):
        members[step, sampler(key.generator(Stream.SAMPLING, step), examples, q)] = True
    return members


def too_often(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    return poisson_sample(generator, n, q * 1.05)


def shuffled_fixed_size(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    return generator.permutation(n)[: round(n * q)]


def with_replacement(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    return np.unique(generator.integers(n, size=generator.binomial(n, q)))


def never_the_last(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    return poisson_sample(generator, n - 1, q)


def some_draws_again(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    """Now and then the draw of two steps before, as from a cache that is not always emptied."""
    drawn = poisson_sample(generator, n, q)
    kept.append(kept[-2] if len(kept) > 1 and generator.random() < 0.04 else drawn)
    return kept[-1]


kept: list[npt.NDArray[np.int64]] = []


def equal_local_masks(generator: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
    """What three ranks with the same seed get when each draws from its own third of the data."""
    local = poisson_sample(generator, n // 3, q)
    return np.concatenate([3 * local + rank for rank in range(3)])


def test_membership_is_an_independent_coin_for_every_example() -> None:
    p_values = poisson_sampling_p_values(memberships(poisson_sample), Q)
    assert min(p_values.values()) > FALSE_ALARM, p_values


@pytest.mark.parametrize(
    "wrong", [too_often, shuffled_fixed_size, with_replacement, never_the_last, equal_local_masks, some_draws_again]
)
def test_the_check_of_the_law_rejects_a_wrong_sampler(wrong: Sampler) -> None:
    p_values = poisson_sampling_p_values(memberships(wrong), Q)
    assert min(p_values.values()) < CAUGHT, p_values


@pytest.mark.parametrize(("examples", "q"), [(20_000, 0.02), (20_000, 0.3)])
def test_large_datasets_are_sampled_by_the_same_law(examples: int, q: float) -> None:
    key, draws = RandomKey.from_seed(12), 300
    counts = np.zeros(examples, dtype=np.int64)
    for step in range(draws):
        counts[poisson_sample(key.generator(Stream.SAMPLING, step), examples, q)] += 1
    z = (counts - draws * q) / np.sqrt(draws * q * (1 - q))
    assert stats.chi2.sf(z @ z, examples) > FALSE_ALARM
    assert stats.binomtest(int(counts.sum()), draws * examples, q).pvalue > FALSE_ALARM
    halves = counts[: examples // 2].sum(), counts.sum()
    assert stats.binomtest(int(halves[0]), int(halves[1]), 0.5).pvalue > FALSE_ALARM


@given(examples=st.integers(1, 500), seed=st.integers(0, 2**32), q=st.floats(1e-6, 1.0))
def test_a_draw_is_a_sorted_set_of_valid_indices(examples: int, seed: int, q: float) -> None:
    drawn = poisson_sample(np.random.default_rng(seed), examples, q)
    assert drawn.dtype == np.int64
    assert np.all(np.diff(drawn) > 0)
    assert np.all((drawn >= 0) & (drawn < examples))
    again = poisson_sample(np.random.default_rng(seed), examples, q)
    assert np.array_equal(drawn, again)


@given(examples=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_probability_one_takes_everything(examples: int, seed: int) -> None:
    assert np.array_equal(poisson_sample(np.random.default_rng(seed), examples, 1.0), np.arange(examples))


def test_a_single_example_is_a_coin() -> None:
    taken = int(memberships(poisson_sample, examples=1, q=0.3, draws=5000).sum())
    assert stats.binomtest(taken, 5000, 0.3).pvalue > FALSE_ALARM


def test_empty_draws_occur_as_often_as_they_should() -> None:
    examples, q, draws = 8, 0.1, 5000
    empty = int((memberships(poisson_sample, examples, q, draws).sum(1) == 0).sum())
    assert stats.binomtest(empty, draws, (1 - q) ** examples).pvalue > FALSE_ALARM


@given(examples=st.integers(0, 200), world_size=st.integers(1, 5))
def test_the_ranks_slices_are_disjoint_cover_the_draw_and_are_as_equal_as_possible(
    examples: int, world_size: int
) -> None:
    drawn = np.sort(np.random.default_rng(examples).permutation(1000)[:examples])
    slices = [rank_slice(drawn, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.sort(np.concatenate(slices)), drawn)
    sizes = [len(part) for part in slices]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_ranks_with_equal_keys_draw_together_by_the_law_and_never_the_same_example(world_size: int) -> None:
    def ranks_together(_: np.random.Generator, n: int, q: float) -> npt.NDArray[np.int64]:
        step = next(steps)
        parts = [
            rank_slice(poisson_sample(key.generator(Stream.SAMPLING, step), n, q), rank, world_size)
            for rank, key in enumerate(keys)
        ]
        together = np.concatenate(parts)
        assert len(np.unique(together)) == len(together)
        return together

    steps = iter(range(DRAWS))
    keys = [RandomKey.from_seed(13) for _ in range(world_size)]
    p_values = poisson_sampling_p_values(memberships(ranks_together, draws=4000), Q)
    assert min(p_values.values()) > FALSE_ALARM, p_values


@pytest.mark.parametrize("expected", [16_384, 65_536, 1_000_000])
def test_a_draw_takes_the_memory_of_the_sample_and_not_of_the_dataset(expected: int) -> None:
    """Of 10⁸ examples. One uniform number for each would be 800 MB."""
    examples = 10**8
    key = RandomKey.from_seed(14)
    tracemalloc.start()
    drawn = poisson_sample(key.generator(Stream.SAMPLING, 0), examples, expected / examples)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * 2**20
    assert abs(len(drawn) - expected) < 6 * expected**0.5
