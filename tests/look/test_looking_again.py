"""Parameters that are thawed or frozen between steps: engines are tried again, once for each set of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_dp import DifferentialPrivacy, run
from tests.conftest import Regressor, loader, trainer


class Alternating(Regressor):
    """Trains its first layer in every other step only."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.net[0].requires_grad_(batch_idx % 2 == 0)


def test_engines_are_tried_once_for_each_set_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[frozenset[str]] = []
    original = run.engine_for

    def noted(planned: Any, *rest: Any, **options: Any) -> Any:
        tried.append(frozenset(name for name, p in planned.module.named_parameters() if p.requires_grad))
        return original(planned, *rest, **options)

    monkeypatch.setattr(run, "engine_for", noted)
    torch.manual_seed(0)
    module = Alternating()
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=3)
    trainer(private, max_steps=7).fit(module, loader())
    assert private.ledger is not None
    assert private.ledger.steps == 7
    assert [len(names) for names in tried] == [4, 2]


def test_no_step_is_taken_with_the_parameters_of_another_set() -> None:
    """Frozen weights do not move, and thawed ones get noise, whichever set was looked at last."""
    moved: list[bool] = []

    class Watched(Alternating):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            super().on_train_batch_start(batch, batch_idx)
            self.before = self.net[0].weight.detach().clone()

        def on_train_batch_end(self, *_: Any) -> None:
            moved.append(not torch.equal(self.before, self.net[0].weight))

    torch.manual_seed(0)
    trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=3), max_steps=6).fit(Watched(), loader())
    assert moved == [True, False, True, False, True, False]
