"""Workers that read ahead, and the time that the step waits for them: neither changes what is released."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism import gaussian as gaussian_module
from tests.conftest import loader, regressor, trainer, weights
from tests.nearly import assert_nearly


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(steps: int, log_train_metrics: bool = True, **options: Any) -> tuple[torch.Tensor, DifferentialPrivacy, Watch]:
    private, watch, module = DifferentialPrivacy(noise_multiplier=1.0, seed=5), Watch(), regressor()
    private.log_train_metrics = log_train_metrics
    trainer(private, watch, max_steps=steps).fit(module, loader(**options))
    return weights(module), private, watch


def test_a_sample_that_was_read_ahead_and_not_used_is_neither_released_nor_charged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    noised: list[int] = []
    add = gaussian_module.add_gaussian_noise

    def noted(*parts: Any, **named: Any) -> None:
        noised.append(named["step"])
        add(*parts, **named)

    monkeypatch.setattr(gaussian_module, "add_gaussian_noise", noted)
    plain, _, _ = fit(6)
    ahead, private, _ = fit(6, num_workers=1, persistent_workers=True, prefetch_factor=4)
    assert_nearly(plain, ahead, rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most
    assert noised == [*range(6), *range(6)]
    assert private.ledger is not None
    assert private.ledger.steps == 6  # of epochs of four steps, in the middle of one


def test_the_time_waited_for_data_is_logged_unless_private_numbers_are_kept_from_the_loggers() -> None:
    _, _, watch = fit(4)
    assert "dp/data_wait" not in watch.seen[0]
    waited = [seen["dp/data_wait"] for seen in watch.seen[1:]]
    assert all(seconds > 0 for seconds in waited)
    assert len(set(waited)) == len(waited)  # of each step, not since the beginning
    _, _, kept = fit(2, log_train_metrics=False)
    assert "dp/steps" in kept.seen[1]
    assert "dp/data_wait" not in kept.seen[1]
