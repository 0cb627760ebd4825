"""Hooks of validation, and callbacks that count: what they move follows from weights, public numbers and validation data."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import random_split
from torchmetrics import MeanMetric

from lightning_dp import DifferentialPrivacy
from lightning_dp.errors import PreflightError
from tests.conftest import Notes, Regressor, loader, regression_data, trainer

HERE = r"test_hooks_of_validation\.py"
said = Notes()


class Weighted(Regressor):
    """Has a weight of its loss, which a hook of validation may set."""

    weight = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.seen = MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("mine", loss)
        self.seen(loss)
        self.left = loss.detach()
        return loss * self.weight


def fit(module: L.LightningModule, *callbacks: L.Callback, data: Any = None, **options: Any) -> DifferentialPrivacy:
    private = DifferentialPrivacy(noise_multiplier=1.0)
    given = {"max_steps": 4, "val_check_interval": 1, "num_sanity_val_steps": 0, **options}
    first, second = data or (regression_data(), regression_data(16, seed=5))
    trainer(private, *callbacks, **given).fit(module, loader(first), loader(second))
    return private


class ByATrainingMetric(Weighted):
    def on_validation_epoch_end(self) -> None:
        self.weight = 1 / float(self.trainer.callback_metrics["mine"])


class ByACopyOfThem(Weighted):
    def on_validation_epoch_end(self) -> None:
        self.weight = 1 / float(dict(self.trainer.callback_metrics)["mine"])


class ByAMetricObject(Weighted):
    def on_validation_epoch_end(self) -> None:
        self.weight = 1 / float(self.seen.compute())


class ByWhatIsLeft(Weighted):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.weight = float(self.left)


class ByTheTrainingData(Weighted):
    def on_validation_end(self) -> None:
        data: Any = self.trainer.train_dataloader
        self.weight = float(data.dataset[0][1])


def _helper(fit: Any, name: str) -> Any:
    return getattr(fit, name)


class ByARoundaboutWay(Weighted):
    """Its code does not name what it reads."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.weight = float(_helper(self.trainer, "callback" + "_metrics")["mine"])


@pytest.mark.parametrize("case", [ByATrainingMetric, ByACopyOfThem, ByWhatIsLeft, ByTheTrainingData, ByAMetricObject])
def test_a_hook_of_validation_that_brings_back_private_values_is_refused(case: type[Weighted]) -> None:
    with pytest.raises(PreflightError, match=rf"changes .*weight.* private examples.*{HERE}"):
        fit(case())


def test_what_its_code_does_not_name_is_withheld() -> None:
    with pytest.raises(PreflightError, match=rf"reads trainer\.callback_metrics\['mine'\] \(.*{HERE}"):
        fit(ByARoundaboutWay())


class ByValidation(Weighted):
    """Goes by validation data, prints what it likes, and reads its own data set."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.mean = MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = (self.net(batch[0]).squeeze(-1) - batch[1]).square().mean()
        self.mean(loss)
        self.losses.append(loss)
        self.log("val/loss", loss)

    def on_validation_epoch_end(self) -> None:
        self.weight = 1.0 + float(torch.stack(self.losses).mean()) + float(self.mean.compute())
        self.losses.clear()
        data: Any = self.trainer.val_dataloaders
        said.append((float(data.dataset[0][1]), float(self.trainer.callback_metrics["val/loss"])))


class Prints(L.Callback):
    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        said.append(float(trainer.callback_metrics["mine"]))


class Stops(L.Callback):
    """Stops when validation has not become better twice."""

    def __init__(self) -> None:
        self.best, self.wait = float("inf"), 0

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        now = float(trainer.callback_metrics["val/loss"])
        self.wait = 0 if now < self.best - 1e9 else self.wait + 1
        self.best = min(self.best, now)
        trainer.should_stop = self.wait >= 2


def test_what_goes_by_validation_works_as_ever() -> None:
    said.clear()
    module = ByValidation()
    both = random_split(regression_data(80), [64, 16])  # parts of one data set
    private = fit(module, Prints(), data=both)
    assert len(said) == 8
    assert module.weight > 1
    assert private.ledger is not None
    assert private.ledger.steps == 4


def test_stopping_by_validation_works_as_ever() -> None:
    stops = Stops()
    private = fit(Regressor(), stops, max_steps=20)
    assert private.ledger is not None
    assert private.ledger.steps == 3
    assert stops.wait == 2


@pytest.mark.filterwarnings("ignore:(EarlyStopping|ReduceLROnPlateau|ModelCheckpoint)")
def test_lightnings_callbacks_on_validation_work_as_ever(tmp_path: Any) -> None:
    class Scheduled(Regressor):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=1e9)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss", "interval": "step", "strict": False},
            }

    best = ModelCheckpoint(tmp_path / "best", monitor="val/loss")
    stopping = EarlyStopping("val/loss", patience=2, min_delta=1e9, check_on_train_epoch_end=False)
    private = fit(
        Scheduled(), stopping, best, LearningRateMonitor(), max_steps=9, enable_checkpointing=True,
        logger=CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    assert private.ledger is not None
    assert private.ledger.steps == 3
    assert best.best_model_path


class EveryThird(L.Callback):
    """Counts for itself, and moves a teacher at every third call."""

    def __init__(self) -> None:
        self.calls = {"all": 0}
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.calls["all"] += 1
        self.losses.append(float(outputs["loss"]))
        if self.calls["all"] % 3 == 0:
            self.move(pl_module)

    def move(self, module: Any) -> None:
        with torch.no_grad():
            module.teacher.copy_(module.net[0].bias)


class ByItsLosses(EveryThird):
    def move(self, module: Any) -> None:
        with torch.no_grad():
            module.teacher.fill_(sum(self.losses))


class WhenLow(EveryThird):
    """Moves it by weights alone, but at a time that losses decide."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        if len(self.losses) > 2 and max(self.losses) > 0.01:
            self.move(pl_module)


class Taught(Regressor):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("teacher", torch.zeros(8))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0 * self.teacher.sum()


def test_a_callback_may_count_for_itself() -> None:
    module, counts = Taught(), EveryThird()
    fit(module, counts, max_steps=7, limit_val_batches=0)
    assert counts.calls == {"all": 7}
    assert len(counts.losses) == 7
    assert module.teacher.abs().sum() > 0


@pytest.mark.parametrize("case", [ByItsLosses, WhenLow])
def test_a_callback_that_moves_the_module_by_private_values_is_refused(case: type[EveryThird]) -> None:
    with pytest.raises(PreflightError, match=rf"{case.__name__}\.on_train_batch_end changes self\.teacher by .*{HERE}"):
        fit(Taught(), case(), max_steps=7, limit_val_batches=0)
