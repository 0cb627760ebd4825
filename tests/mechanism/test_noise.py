from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_dp.mechanism.gaussian import add_gaussian_noise
from lightning_dp.mechanism.noise import BLOCK
from lightning_dp.mechanism.randomness import RandomKey, Stream
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, independence_p_values, noised, standard_normal_p_values

COORDINATES = 200_000
STD = 2.5
KEY = RandomKey.from_seed(21)
Noise = npt.NDArray[np.float64]


def noise(coordinates: int = COORDINATES, step: int = 0, dtype: torch.dtype = torch.float32, std: float = STD) -> Noise:
    total = torch.zeros(coordinates, dtype=dtype)
    return noised(total, noise_std=std, key=KEY, step=step).double().numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("std", [1e-6, 1.0, 5e4])
def test_every_coordinate_gets_independent_gaussian_noise_of_the_given_scale(dtype: torch.dtype, std: float) -> None:
    p_values = standard_normal_p_values(noise(dtype=dtype, std=std) / std)
    assert min(p_values.values()) > FALSE_ALARM, p_values


WRONG: dict[str, Callable[[Noise], Noise]] = {
    "3 % too much": lambda z: 1.03 * z,
    "3 % too little": lambda z: z / 1.03,
    "added twice": lambda z: z + np.roll(z, 12_345),
    "variance taken for standard deviation": lambda z: z * np.sqrt(STD),
    "one coordinate in twenty without noise": lambda z: z * (np.arange(len(z)) % 20 > 0),
    "every second parameter without noise": lambda z: z * (np.arange(len(z)) // 1000 % 2),
    "one number for two coordinates": lambda z: np.repeat(z[::2], 2),
    "shifted": lambda z: z + 0.02,
    "not Gaussian, though of the right variance": lambda z: np.sqrt(3) * (2 * _ranks(z) - 1),
    "cut off at 3": lambda z: np.clip(z, -3, 3),
}


def _ranks(z: Noise) -> Noise:
    return np.argsort(np.argsort(z)) / len(z)


@pytest.mark.parametrize("fault", WRONG)
def test_the_check_of_the_law_rejects_wrong_noise(fault: str) -> None:
    p_values = standard_normal_p_values(WRONG[fault](noise() / STD))
    assert min(p_values.values()) < CAUGHT, p_values


def test_the_noise_of_different_steps_is_independent() -> None:
    p_values = independence_p_values([noise(20_000, step) / STD for step in range(40)])
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_the_noise_of_different_keys_and_of_other_streams_is_independent() -> None:
    rows = [
        noised(torch.zeros(20_000), noise_std=1.0, key=RandomKey.from_seed(seed), step=0).numpy() for seed in range(10)
    ]
    rows += [RandomKey.from_seed(seed).generator(stream, 0).standard_normal(20_000, "float32")
             for seed in range(3) for stream in Stream if stream is not Stream.NOISE]  # fmt: skip
    p_values = independence_p_values(rows)
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_the_check_of_independence_rejects_noise_that_is_used_again() -> None:
    rows = [noise(20_000, step) / STD for step in range(39)]
    assert min(independence_p_values([*rows, rows[17]]).values()) < CAUGHT
    assert min(independence_p_values([*rows, 0.9 * noise(20_000, 40) / STD + 0.43 * rows[3]]).values()) < CAUGHT


def test_the_parts_of_one_vector_are_independent() -> None:
    p_values = independence_p_values(noise(20 * 20_000).reshape(20, -1) / STD)
    assert min(p_values.values()) > FALSE_ALARM, p_values


def test_the_noise_is_a_function_of_key_and_step_alone() -> None:
    assert np.array_equal(noise(1000, step=4), noise(1000, step=4))
    torch.manual_seed(0)
    first = noise(1000, step=4)
    torch.manual_seed(1)
    assert np.array_equal(first, noise(1000, step=4))
    assert not np.array_equal(first, noise(1000, step=5))
    signal = torch.linspace(-3, 3, 1000, dtype=torch.float64)
    noisy = noised(signal.clone(), noise_std=STD, key=KEY, step=4) - signal
    np.testing.assert_allclose(noisy, noise(1000, step=4, dtype=torch.float64), rtol=0, atol=1e-14)


def test_double_precision_noise_is_drawn_in_double_precision() -> None:
    drawn = noise(1000, dtype=torch.float64)
    assert not np.any(drawn == drawn.astype(np.float32))


def test_noise_is_added_in_place_and_keeps_the_type() -> None:
    for dtype in (torch.float32, torch.float64):
        total = torch.ones(10, dtype=dtype)
        answer = noised(total, noise_std=1.0, key=KEY, step=0)
        assert answer is total
        assert answer.dtype == dtype
        assert not torch.any(total == 1)


@pytest.mark.parametrize("total", [torch.arange(5.0), torch.empty(0)])
def test_no_noise_and_nothing_to_add_it_to_leave_the_sum_as_it_is(total: Tensor) -> None:
    std = 0.0 if len(total) else 1.0
    before = total.clone()
    assert noised(total, noise_std=std, key=KEY, step=0) is total
    assert torch.equal(total, before)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bfloat16, torch.float16, torch.int64])
def test_a_sum_that_would_get_wrong_noise_is_refused(dtype: torch.dtype) -> None:
    """Complex sums would stay without noise in the imaginary part; short floats round it away."""
    with pytest.raises(TypeError, match=rf"dtype={dtype}: expected torch.float32 or torch.float64"):
        noised(torch.zeros(3, dtype=dtype), noise_std=1.0, key=KEY, step=0)


@settings(max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 2 * BLOCK + 500), max_size=8),
    owners=st.lists(st.integers(0, 2), min_size=9, max_size=9),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_that_ranks_keep_get_the_noise_of_the_whole(
    dtype: torch.dtype, cuts: list[int], owners: list[int]
) -> None:
    """Wherever the sum is cut and whoever keeps which part, empty ones included."""
    coordinates, total = 2 * BLOCK + 500, torch.zeros(2 * BLOCK + 500, dtype=dtype)
    places = [0, *sorted(cuts), coordinates]
    parts = [(start, total[start:end]) for start, end in pairwise(places)]
    for rank in range(3):
        kept = [part for part, owner in zip(parts, owners, strict=False) if owner == rank]
        add_gaussian_noise(kept, coordinates, noise_std=STD, key=KEY, step=5)
    assert np.array_equal(total.double().numpy(), noise(coordinates, 5, dtype))


@pytest.mark.parametrize(
    ("places", "told"),
    [
        ([0, 5], "a part from 5 to 15 after one to 10"),
        ([10, 0], "a part from 0 to 10 after one to 20"),
        ([0, 15], "a part from 15 to 25 after one to 10, of 20 coordinates"),
    ],
)
def test_parts_that_overlap_or_reach_too_far_are_refused(places: list[int], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        add_gaussian_noise([(p, torch.zeros(10)) for p in places], 20, noise_std=STD, key=KEY, step=0)


def test_a_part_in_integers_is_refused() -> None:
    with pytest.raises(TypeError, match=r"a part of dtype=torch\.int64"):
        add_gaussian_noise([(0, torch.zeros(3, dtype=torch.int64))], 3, noise_std=STD, key=KEY, step=0)
