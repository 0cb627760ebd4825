"""Engine × clipping style × views × privacy unit: each run comes to what a loop by hand comes to."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.harness import EVERY, Setting, by_hand, by_package


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_a_run_is_the_loop_by_hand(setting: Setting, engine: str) -> None:
    torch.testing.assert_close(by_package(setting, engine), by_hand(setting), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_small_micro_batches_and_padding_change_nothing(setting: Setting) -> None:
    options = {} if setting.users else {"static_shapes": True}  # users differ in how many examples they have
    found = by_package(setting, "vmap", physical_batch_size=3, **options)
    torch.testing.assert_close(found, by_hand(setting), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("setting", EVERY, ids=str)
def test_in_float64_it_is_the_loop_to_the_last_digits(setting: Setting) -> None:
    exact = dataclasses.replace(setting, sigma=0.0, dtype=torch.float64)
    torch.testing.assert_close(by_package(exact, "ghost").double(), by_hand(exact), rtol=1e-9, atol=1e-11)


def test_settings_that_differ_come_to_other_weights() -> None:
    """No two of them are the same run, so that none can pass for another."""
    found = [by_hand(setting) for setting in EVERY]
    for first, one in enumerate(found):
        assert all(float((one - other).abs().max()) > 1e-4 for other in found[:first])
