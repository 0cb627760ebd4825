"""A privacy unit with secure noise, a bound on draws, a measured physical batch size: it is still the user that is clipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy
from lightning_dp.step.open_step import OpenStep
from tests.batches.units.data import USERS, WithUser, dict_regressor
from tests.batches.units.test_users import clipped_per_example
from tests.conftest import trainer, weights
from tests.guarantees.mutations import caught, patched
from tests.harness import Setting, by_hand
from tests.nearly import assert_nearly

CLIP, STEPS = 0.05, 4


def fit(batch_size: int = USERS, **options: Any) -> tuple[Tensor, DifferentialPrivacy]:
    private = DifferentialPrivacy(**{"clip_norm": CLIP, "privacy_unit": "user_id", **options})
    module = dict_regressor()
    trainer(private, max_steps=STEPS).fit(module, DataLoader(WithUser(), batch_size=batch_size))
    return weights(module), private


def check_secure() -> None:
    """All users are drawn, so the sum of integers in the first step is that of the loop over users."""
    sums: list[Tensor] = []

    def recorded(step: OpenStep, gradient: Any, **options: Any) -> Any:
        sums.append(torch.cat([g.flatten() for g in gradient.values()]))
        return released(step, gradient, **options)

    released = OpenStep.release
    with patched((OpenStep, "release", recorded)):
        _, private = fit(noise_multiplier=1.0, secure=True)
    assert sums[0].dtype == torch.int64
    start = weights(dict_regressor())
    end = by_hand(Setting(users=True, sigma=0.0, clip=CLIP, batch=USERS, seed=0, lr=1.0, most=32, steps=1))
    found = sums[0] * CLIP / private.plan.resolution / USERS
    torch.testing.assert_close(found.float(), start - end, rtol=1e-3, atol=1e-6)
    assert "user_id" in str(private.statement())


def test_secure_noise_on_sums_over_users() -> None:
    check_secure()
    with caught(clipped_per_example()):
        check_secure()


def test_a_bound_on_draws_counts_users() -> None:
    """Twelve users have 24 examples: a bound of 13 cuts no draw and costs nothing, one of 10 does."""
    bounded, private = fit(batch_size=9, noise_multiplier=1.0, seed=0, max_batch_size=13)
    free, free_private = fit(batch_size=9, noise_multiplier=1.0, seed=0)
    assert private.plan.max_batch_size == 13
    assert private.plan.dataset_size == USERS
    assert_nearly(bounded, free, rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most
    _, cut = fit(batch_size=9, noise_multiplier=1.0, max_batch_size=10)
    spent = [one.statement().epsilon for one in (free_private, private, cut)]
    assert spent[0] == pytest.approx(spent[1], rel=1e-9)
    assert spent[1] < spent[2] < float("inf")


@pytest.mark.parametrize("engine", ["ghost", "vmap"])
def test_a_measured_size_changes_nothing(engine: str) -> None:
    found = [
        fit(batch_size=3, noise_multiplier=0.7, seed=3, engine=engine, physical_batch_size=size)[0]
        for size in ("auto", None)
    ]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
