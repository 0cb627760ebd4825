"""A fit that must be refused before its first step."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, trainer, weights


class NeverStepped(Regressor):
    """Fails the test if a training_step has been followed by anything."""

    def on_before_zero_grad(self, optimizer: Any) -> None:
        raise AssertionError("a step was reached")


def refused(
    error: type[Exception],
    *words: str,
    module: L.LightningModule | None = None,
    data: Any = None,
    callbacks: tuple[L.Callback, ...] = (),
    private: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Assert that fit raises ``error`` whose text holds all ``words``, before any step, leaving the weights alone."""
    module = NeverStepped() if module is None else module
    before = weights(module).clone()
    callback = DifferentialPrivacy(**(private or {"noise_multiplier": 1.0}))
    with pytest.raises(error) as caught:
        trainer(*callbacks, callback, **options).fit(module, loader() if data is None else data)
    for word in (*words, "expected"):
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert torch.equal(before, weights(module))
    assert callback.ledger is None or callback.ledger.steps == 0
