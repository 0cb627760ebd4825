"""Modules whose hooks set what training_step reads: engines are tried after those hooks, and before anything is released."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regression_data, trainer, weights

EXAMPLES = 12
HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")


def prepared_by(hook: str, manual: bool = False) -> Regressor:
    """A module whose ``hook`` sets the scale and the loss that training_step uses."""

    class Prepared(Regressor):
        def __init__(self) -> None:
            super().__init__(lr=0.1)
            self.automatic_optimization = not manual
            self.order: list[str] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = self.criterion(self.net(batch[0]).squeeze(-1), batch[1]) * self.scale
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def on_validation_start(self) -> None:
            self.order.append("validation")

    def prepare(self: Any, *_: Any) -> None:
        self.scale = 3.0
        self.criterion = F.mse_loss
        self.order.append(hook)

    setattr(Prepared, hook, prepare)
    torch.manual_seed(0)
    return Prepared()


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("manual", [False, True])
def test_what_hooks_set_is_there_when_engines_are_tried(hook: str, manual: bool) -> None:
    found = []
    for private in (False, True):
        module = prepared_by(hook, manual)
        callbacks = (
            [DifferentialPrivacy(noise_multiplier=0.0, clip_norm=float("inf"), expected_batch_size=EXAMPLES)]
            if private
            else []
        )
        trainer(*callbacks, max_steps=3).fit(module, loader(regression_data(EXAMPLES), batch_size=EXAMPLES), loader())
        found.append((weights(module), set(module.order)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    assert found[1][1] == found[0][1] == {hook, "validation"}


class _BySetter(L.Callback):
    """A callback that sets what training_step reads."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.scale, pl_module.criterion = 2.0, F.mse_loss


def test_a_callback_may_set_it_wherever_it_stands() -> None:
    module = prepared_by("on_test_start")
    trainer(DifferentialPrivacy(noise_multiplier=1.0), _BySetter(), max_steps=2).fit(module, loader())


def test_nothing_is_written_or_released_before_the_engine_is_chosen(tmp_path: Path) -> None:
    """The engine check comes late, and a refusal by it leaves weights and ledger as they were."""

    class Coupled(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            predicted = self.net(batch[0])
            return (predicted @ predicted.T).logsumexp(1).mean()

    module, private = Coupled(), DifferentialPrivacy(noise_multiplier=1.0)
    before = weights(module)
    with pytest.raises(PreflightError, match="couples examples"):
        trainer(private, max_steps=2, default_root_dir=tmp_path).fit(module, loader(), loader())
    torch.testing.assert_close(weights(module), before, rtol=0.0, atol=0.0)
    assert private.ledger is not None
    assert private.ledger.steps == 0
    assert not list(tmp_path.rglob("privacy.journal"))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_measured_size_holds_from_the_first_step_on(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first sample is being read already when the size of micro-batches is found: it is read again, in other pieces."""
    from lightning_dp import run

    sizes: list[int] = []

    class Noting(Regressor):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            if self.trainer.training and self.trainer.strategy.private_fit._step is not None:
                sizes.append(len(batch[0]))
            return batch

    def settled(planned: Any, *_: Any) -> int:
        planned.loader.resize(5)
        return 5

    found = []
    for changed in (False, True):
        sizes.clear()
        if changed:
            monkeypatch.setattr(run, "settle_physical_batch_size", settled)
        torch.manual_seed(0)
        module = Noting()
        rows = ["on_after_batch_transfer"]  # else it sees one example at a time, whatever the size
        private = DifferentialPrivacy(noise_multiplier=1.0, seed=0, physical_batch_size=64, row_wise=rows)
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        trainer(private, max_steps=3).fit(module, loader(regression_data(64), batch_size=16, **options))
        found.append(weights(module))
        assert (max(sizes) == 5) == changed
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_a_hook_that_skips_the_epoch_skips_it(tmp_path: Path) -> None:
    """-1 from on_train_batch_start ends the epoch; what was drawn is not used, and the next epoch goes on."""

    class Skips(Regressor):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 or (self.current_epoch == 2 and batch_idx == 2) else None

    private = DifferentialPrivacy(noise_multiplier=1.0)
    fit = trainer(private, max_epochs=4, max_steps=-1)
    fit.fit(Skips(), loader())  # four steps in an epoch
    assert fit.global_step == private.ledger.steps == 4 + 2 + 4


def test_a_resumed_run_tries_after_its_hooks_too(tmp_path: Path) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0)
    module = prepared_by("on_train_start")
    fit = trainer(private, max_steps=2)
    fit.fit(module, loader())
    fit.save_checkpoint(tmp_path / "some.ckpt")
    again = DifferentialPrivacy(noise_multiplier=1.0)
    trainer(again, max_steps=4).fit(prepared_by("on_train_start"), loader(), ckpt_path=tmp_path / "some.ckpt")
    assert again.ledger is not None
    assert again.ledger.steps == 4
