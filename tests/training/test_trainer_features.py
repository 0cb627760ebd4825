"""What the Trainer offers beside training itself, with the real components, several to a fit."""

from __future__ import annotations

import copy
import pickle
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    ThroughputMonitor,
    Timer,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from lightning_dp import DifferentialPrivacy, PreflightError
from tests.conftest import Regressor, loader, regressor, trainer, weights
from tests.nearly import assert_nearly


class Scheduled(Regressor):
    """With everything that validate, test and predict need."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/targets", batch[1].mean())

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch[1]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "seed": 0, **options})


def test_many_at_once_change_nothing_and_charge_each_step_once(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, callback, timer = Scheduled(), private(), Timer(timedelta(hours=1))
    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss", save_last=True)
    throughput = ThroughputMonitor(
        batch_size_fn=lambda _: 16, window_size=2
    )  # the expected batch size, which is public
    fit = trainer(
        callback, best, timer, throughput, LearningRateMonitor(), RichProgressBar(), DeviceStatsMonitor(),
        logger=CSVLogger(tmp_path), enable_checkpointing=True, enable_progress_bar=True, profiler="simple",
        max_epochs=2, max_steps=-1, val_check_interval=2, limit_train_batches=3, log_every_n_steps=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="flops_per_batch"):
        fit.fit(module, loader(), loader())
    assert callback.ledger.steps == fit.global_step == callback.plan.steps == 6
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.5**7)
    assert Path(best.best_model_path).exists()
    assert timer.time_elapsed("train") > 0
    text = (Path(fit.log_dir) / "metrics.csv").read_text()
    assert all(name in text for name in ("lr-SGD", "train/device/samples_per_sec", "dp/epsilon", "val/loss"))

    torch.manual_seed(0)
    alone = Scheduled()
    trainer(private(), max_steps=6).fit(alone, loader())
    assert_nearly(weights(alone), weights(module), rtol=1e-5, atol=1e-6)  # float32; one step of noise moves them by 0.1

    spent = callback.ledger.steps
    assert "val/loss" in fit.validate(module, loader(), verbose=False)[0]
    assert "test/targets" in fit.test(module, loader(), verbose=False)[0]
    assert len(fit.predict(module, loader())) == 4
    assert callback.ledger.steps == spent


@pytest.mark.parametrize("profiler", ["advanced", "pytorch"])
@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler")
def test_profilers(profiler: str, tmp_path: Path) -> None:
    callback = private()
    trainer(callback, profiler=profiler, max_steps=2, default_root_dir=tmp_path).fit(regressor(), loader())
    assert callback.ledger.steps == 2


def test_weight_averaging_of_lightnings_own() -> None:
    callback, module = private(), regressor()
    averaging = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
    trainer(callback, averaging, max_epochs=3, max_steps=-1).fit(module, loader())
    assert callback.ledger.steps == callback.plan.steps == 12


@pytest.mark.filterwarnings("ignore:Found 1 module.* in eval mode")
def test_weight_averaging_that_would_read_the_data_once_more_is_refused() -> None:
    module = regressor()
    module.net.append(nn.BatchNorm1d(1).requires_grad_(False).eval())
    with pytest.raises(PreflightError, match=r"StochasticWeightAveraging with BatchNorm.*expected.*ExponentialMoving"):
        trainer(private(), StochasticWeightAveraging(swa_lrs=0.1)).fit(module, loader())


def test_decisions_by_metrics_without_noise_are_warned_about() -> None:
    stopping = EarlyStopping("val/loss", patience=1, check_on_train_epoch_end=False, min_delta=1e9)
    callback = private(epsilon=3.0, noise_multiplier=None, delta=1e-3)
    with pytest.warns(UserWarning, match=r"EarlyStopping\(monitor='val/loss'\) decides when.*public"):
        trainer(callback, stopping, max_epochs=5, max_steps=-1).fit(regressor(), loader(), loader())
    assert callback.ledger.steps == 8  # stopped after two epochs: charged for what was done, not for what was planned
    assert callback.statement().epsilon < 3.0

    class Plateau(Regressor):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}

    with pytest.warns(UserWarning, match=r"ReduceLROnPlateau\(monitor='val/loss'\)"):
        trainer(private(), max_epochs=1, max_steps=-1).fit(Plateau(), loader(), loader())


def test_max_time_ends_a_run_whose_steps_are_charged() -> None:
    callback = private()
    fit = trainer(callback, max_time=timedelta(milliseconds=300), max_steps=-1, max_epochs=-1)
    fit.fit(regressor(), loader())
    assert callback.ledger.steps == fit.global_step > 0
    assert callback.plan.steps is None


def test_a_second_fit_of_the_same_module_goes_on_spending() -> None:
    module, callback = regressor(), private(seed=None)
    fit = trainer(callback, max_steps=3)
    fit.fit(module, loader())
    after_one = callback.statement().epsilon
    fit.fit_loop.epoch_loop.max_steps = 5
    fit.fit(module, loader())
    assert callback.ledger.steps == fit.global_step == 5
    trainer(callback, max_steps=2).fit(module, loader())
    assert callback.ledger.steps == 7
    assert callback.statement().epsilon > after_one


def test_copies_of_the_callback_spend_for_themselves() -> None:
    callback = private(seed=None)
    trainer(callback, max_steps=2).fit(regressor(), loader())
    copies = [copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))]
    assert len({one._account.address for one in (callback, *copies)}) == 3
    for one in copies:
        trainer(one, max_steps=2).fit(regressor(), loader())
        assert one.ledger.steps == 4
    assert callback.ledger.steps == 2


@pytest.mark.nightly
def test_a_spawned_process_reports_home() -> None:
    callback, module = private(), regressor()
    before = weights(module).clone()
    trainer(callback, strategy="ddp_spawn", devices=1, max_steps=3).fit(module, loader())
    assert callback.ledger.steps == 3
    assert callback.statement().epsilon > 0
    assert not torch.equal(before, weights(module))
