"""What the Trainer does equals a batch-of-one loop written here, and plain Lightning when there is no noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regression_data, regressor, trainer, weights
from tests.harness import Setting, by_hand, by_package

SETTING = Setting(batch=16, steps=6, examples=64)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("physical_batch_size", [None, 1, 5])
def test_training_equals_the_batch_of_one_loop(engine: str, physical_batch_size: int | None) -> None:
    found = by_package(SETTING, engine, physical_batch_size=physical_batch_size)
    torch.testing.assert_close(found, by_hand(SETTING), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("style", ["per_layer", "automatic"])
def test_the_statement_names_the_style(style: str) -> None:
    private = DifferentialPrivacy(noise_multiplier=0.7, clipping=style)
    trainer(private, max_steps=1).fit(regressor(), loader())
    assert private.statement().to_dict()["clipping"] == style
    assert f"({style.replace('_', ' ')} clipping)" in str(private.statement())


def test_without_noise_clip_or_sampling_it_is_plain_lightning() -> None:
    data = regression_data(32)
    private, plain = regressor(), regressor()
    callback = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=math.inf)
    trainer(callback, max_steps=8).fit(private, DataLoader(data, batch_size=32))
    trainer(max_steps=8).fit(plain, DataLoader(data, batch_size=32))
    torch.testing.assert_close(weights(private), weights(plain), rtol=1e-5, atol=1e-6)
    assert callback.statement().epsilon == math.inf


def test_the_same_in_float64_and_close_in_bf16() -> None:
    results = {}
    for precision in ("32-true", "64-true", "bf16-mixed", "bf16-true"):
        module = regressor()
        trainer(DifferentialPrivacy(noise_multiplier=0.0, seed=0), precision=precision, max_steps=3).fit(
            module, loader()
        )
        results[precision] = weights(module).double()
    torch.testing.assert_close(results["32-true"], results["64-true"], rtol=1e-5, atol=1e-6)
    for half in ("bf16-mixed", "bf16-true"):
        torch.testing.assert_close(results[half], results["64-true"], rtol=0.05, atol=0.02)


def test_the_divisor_is_public_and_not_the_realised_batch() -> None:
    """Two neighbouring data sets: the update differs by one clipped gradient over the same B, not by a rescaling."""
    updates = []
    for size in (20, 21):
        module = regressor(lr=1.0)
        before = weights(module)
        data = regression_data(21)
        subset = torch.utils.data.Subset(data, range(size))
        private = DifferentialPrivacy(noise_multiplier=0.0, clip_norm=0.01, expected_batch_size=20, dataset_size=20)
        trainer(private, max_steps=1).fit(module, DataLoader(subset, batch_size=20))
        updates.append(weights(module) - before)
    difference = float((updates[1] - updates[0]).norm())
    assert difference == pytest.approx(0.01 / 20, rel=1e-3)  # all gradients are far longer than 0.01


def test_sampling_probability_uses_the_public_dataset_size() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, dataset_size=128)
    trainer(private, max_steps=1).fit(regressor(), loader(batch_size=16))
    assert private.plan is not None
    assert private.plan.sampling_probability == 16 / 128


def test_gradient_accumulators_outside_the_optimizer_see_the_noisy_gradient_only() -> None:
    """on_after_backward and on_before_optimizer_step hooks find exactly the released gradient in p.grad."""
    seen: list[np.ndarray] = []
    module = regressor(lr=1.0)
    before = weights(module)
    module.on_before_optimizer_step = lambda optimizer: seen.append(
        torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).numpy().copy()
    )
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    np.testing.assert_allclose(seen[0], (before - weights(module)).numpy(), rtol=1e-4, atol=1e-6)
