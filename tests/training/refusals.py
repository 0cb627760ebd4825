"""A fit that must be refused before its first batch."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

from lightning_dp import DifferentialPrivacy
from tests.conftest import Regressor, loader, trainer, weights


class NeverStepped(Regressor):
    """Fails the test if a training batch is reached or a parameter moves."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("a batch was reached")


def refused(
    error: type[Exception],
    *words: str,
    module: L.LightningModule | None = None,
    data: Any = None,
    callbacks: tuple[L.Callback, ...] = (),
    private: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """Assert that fit raises ``error`` whose text holds all ``words``, before any batch, leaving the weights alone."""
    module = NeverStepped() if module is None else module
    before = weights(module).clone()
    callback = DifferentialPrivacy(**(private or {"noise_multiplier": 1.0}))
    with pytest.raises(error) as caught:
        trainer(*callbacks, callback, **options).fit(module, loader() if data is None else data)
    for word in (*words, "expected"):
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert torch.equal(before, weights(module))
