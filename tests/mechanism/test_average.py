from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.mechanism.average import average, warmed_up_decay


@given(decay=st.floats(0, 1), updates=st.integers(0, 10**6))
def test_the_decay_warms_up_and_never_exceeds_its_limit(decay: float, updates: int) -> None:
    now, later = warmed_up_decay(decay, updates), warmed_up_decay(decay, updates + 1)
    assert 0 <= now <= later <= decay
    assert math.isclose(now, min(decay, (1 + updates) / (10 + updates)), rel_tol=1e-12)


def test_the_decay_is_reached_when_the_warm_up_crosses_it() -> None:
    crossing = round((10 * 0.99 - 1) / (1 - 0.99))
    assert warmed_up_decay(0.99, crossing - 2) < 0.99
    assert warmed_up_decay(0.99, crossing + 1) == 0.99


@given(decay=st.floats(0, 1), seed=st.integers(0, 99))
def test_an_average_is_the_convex_combination_of_old_and_new(decay: float, seed: int) -> None:
    old, new = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(average(old, new, decay), decay * old + (1 - decay) * new, rtol=0, atol=1e-12)
    torch.testing.assert_close(average(old, old, decay), old)
    assert average(old.float(), new, decay).dtype == torch.float32


def test_averaging_a_constant_forgets_the_start() -> None:
    value = torch.zeros(1)
    for updates in range(200):
        value = average(value, torch.ones(1), warmed_up_decay(0.9, updates))
    torch.testing.assert_close(value, torch.ones(1), atol=1e-5, rtol=0)
