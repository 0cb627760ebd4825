"""Logging, metrics, schedulers, checkpoints, validation and hooks behave as they do without the line."""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection

from lightning_dp import DifferentialPrivacy, PrivateSingleDeviceStrategy
from tests.conftest import Notes, Regressor, loader, regression_data, regressor, trainer, weights
from tests.nearly import assert_nearly


class Talkative(Regressor):
    """Logs in every way people log."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.error = MeanAbsoluteError()
        self.several = MetricCollection({"mse": MeanSquaredError(), "mae": MeanAbsoluteError()}, prefix="several/")
        self.mean = MeanMetric()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Any]:
        inputs, targets = batch
        predicted = self.net(inputs).squeeze(-1)
        loss = nn.functional.mse_loss(predicted, targets)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log_dict({"a": loss * 2, "b": predicted.mean()}, on_epoch=True)
        self.log("count", float(len(targets)), reduce_fx="sum")
        self.log("largest", predicted.max(), reduce_fx="max", on_epoch=True, on_step=False)
        self.error(predicted, targets)
        self.log("error", self.error, on_step=True, on_epoch=True)
        self.log("forward_value", self.error(predicted, targets))
        self.log_dict(self.several(predicted, targets), on_step=False, on_epoch=True)
        self.mean.update(loss)
        self.log("mean", self.mean, on_epoch=True, on_step=False)
        return {"loss": loss, "predicted": predicted}


class Outputs(L.Callback):
    def __init__(self) -> None:
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.outputs.append(outputs)


@pytest.mark.parametrize("engine", ["ghost", "vmap", "loop"])
@pytest.mark.parametrize("physical_batch_size", [None, 7])
def test_everything_logged_equals_plain_lightning(engine: str, physical_batch_size: int | None) -> None:
    data = regression_data(32)
    logged, outputs = [], []
    private = DifferentialPrivacy(
        noise_multiplier=0.0, clip_norm=math.inf, engine=engine, physical_batch_size=physical_batch_size
    )
    for callbacks in ([], [private]):
        torch.manual_seed(0)
        module, keep = Talkative(), Outputs()
        fit = trainer(*callbacks, keep, max_steps=3)
        fit.fit(module, DataLoader(data, batch_size=32))
        logged.append({name: value for name, value in fit.callback_metrics.items() if not name.startswith("dp/")})
        outputs.append(keep.outputs)
    plain, dp = logged
    assert plain.keys() == dp.keys()
    for name in plain:
        if name == "count":
            continue  # a Python number counts once per training_step call: 32 calls of one example
        torch.testing.assert_close(dp[name], plain[name], rtol=1e-4, atol=1e-5, msg=name)
    assert dp["count"] == 32.0
    for of_dp, of_plain in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(of_dp["loss"], of_plain["loss"], rtol=1e-4, atol=1e-5)
        assert of_dp["predicted"].shape == of_plain["predicted"].shape
        torch.testing.assert_close(
            of_dp["predicted"].sort().values, of_plain["predicted"].sort().values, rtol=1e-4, atol=1e-5
        )


def test_train_metrics_can_be_kept_from_the_loggers() -> None:
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0, log_train_metrics=False), max_steps=2)
    fit.fit(Talkative(), loader())
    assert not {"loss", "error", "mean"} & set(fit.callback_metrics)
    assert "dp/epsilon" in fit.callback_metrics


def test_the_first_logging_of_private_train_metrics_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(regressor(), loader())
    told = [r.message for r in caplog.records if "log_train_metrics=False" in r.message]
    assert len(told) == 1
    assert "train/loss" in told[0]


def test_a_scheduler_moves_the_rate_of_the_users_own_optimizer() -> None:
    class Scheduled(Regressor):
        def configure_optimizers(self) -> Any:
            self.mine = torch.optim.AdamW(self.parameters(), lr=1.0)
            rates = torch.optim.lr_scheduler.StepLR(self.mine, step_size=1, gamma=0.5)
            return {"optimizer": self.mine, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    module = Scheduled()
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3)
    fit.fit(module, loader())
    assert type(fit.optimizers[0]) is torch.optim.AdamW
    assert fit.optimizers[0] is module.mine
    assert module.mine.param_groups[0]["lr"] == 0.125


def test_a_zero_rate_scheduler_stops_all_movement() -> None:
    class Zero(Regressor):
        def configure_optimizers(self) -> Any:
            mine = torch.optim.SGD(self.parameters(), lr=1.0)
            return [mine], [torch.optim.lr_scheduler.LambdaLR(mine, lambda step: 0.0)]

    module = Zero()
    before = weights(module).clone()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=3).fit(module, loader())
    assert torch.equal(before, weights(module))


def test_estimated_stepping_batches_in_configure_optimizers() -> None:
    class OneCycle(Regressor):
        def configure_optimizers(self) -> Any:
            mine = torch.optim.SGD(self.parameters(), lr=0.1)
            self.total = self.trainer.estimated_stepping_batches
            return [mine], [torch.optim.lr_scheduler.OneCycleLR(mine, 0.1, total_steps=int(self.total))]

    module = OneCycle()
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=-1, max_epochs=3)
    fit.fit(module, loader(batch_size=10))
    assert module.total == fit.global_step == 3 * 7


def test_parameter_groups_frozen_and_tied_parameters() -> None:
    class Odd(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
            self.net[2].weight = self.net[0].weight  # tied
            self.net[4].bias.requires_grad_(False)  # frozen

        def configure_optimizers(self) -> Any:
            last = list(self.net[4].parameters())
            rest = [p for p in self.parameters() if all(p is not q for q in last)]
            return torch.optim.SGD([{"params": rest, "lr": 0.0}, {"params": last}], lr=0.1)

    module = Odd()
    before = [p.detach().clone() for p in module.parameters()]
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(module, loader())
    moved = {name for (name, p), old in zip(module.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved == {"net.4.weight"}
    assert module.net[2].weight is module.net[0].weight


def test_state_dict_keys_checkpoints_and_loading_are_unchanged(tmp_path: Path) -> None:
    module = regressor()
    keys = list(module.state_dict())
    save = ModelCheckpoint(tmp_path, monitor="val/loss", filename="best")
    fit = trainer(save, DifferentialPrivacy(noise_multiplier=1.0), max_steps=8, enable_checkpointing=True)
    fit.fit(module, loader(), loader())
    assert list(module.state_dict()) == keys
    assert save.best_model_path
    loaded = Regressor.load_from_checkpoint(save.best_model_path, weights_only=False)
    assert list(loaded.state_dict()) == keys
    assert trainer().validate(loaded, loader(), verbose=False)[0]["val/loss"] == pytest.approx(
        float(save.best_model_score or 0)
    )


def test_validation_test_and_predict_read_all_examples_in_order() -> None:
    class Reading(Regressor):
        seen: list[float]

        def on_validation_epoch_start(self) -> None:
            self.seen = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen += batch[1].tolist()

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return batch[1]

    module, data = Reading(), regression_data()
    fit = trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=4)
    fit.fit(module, loader(data), loader(data))
    assert module.seen == data.tensors[1].tolist()
    fit.validate(module, loader(data), verbose=False)
    assert module.seen == data.tensors[1].tolist()
    assert torch.equal(torch.cat(fit.predict(module, loader(data))), data.tensors[1])


def test_batch_transfer_hooks_see_micro_batches_and_never_the_logical_one() -> None:
    seen = Notes()

    class Hooked(Regressor):
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(("before", len(batch[0])))
            return batch

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            seen.append(("after", len(batch[0])))
            return batch[0] * 2, batch[1]

    trainer(DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=5, engine="vmap"), max_steps=3).fit(
        Hooked(), loader()
    )
    assert seen
    assert max(size for _, size in seen) <= 5
    assert [kind for kind, _ in seen[:4]] == ["before", "after", "before", "after"]


def test_hooks_run_in_lightnings_order_once_per_step() -> None:
    calls: list[str] = []

    class Hooked(Regressor):
        def on_before_zero_grad(self, optimizer: Any) -> None:
            calls.append("zero_grad")

        def on_before_backward(self, loss: Tensor) -> None:
            calls.append("before_backward")

        def on_after_backward(self) -> None:
            assert all(p.grad is not None for p in self.parameters())
            calls.append("after_backward")

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            calls.append("optimizer_step")

    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(Hooked(), loader())
    assert calls == ["zero_grad", "before_backward", "after_backward", "optimizer_step"] * 2


def test_global_step_epochs_and_progress_count_private_steps() -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=3)
    fit = trainer(private, max_steps=-1, max_epochs=2)
    fit.fit(regressor(), loader())
    assert fit.global_step == fit.fit_loop.total_batch_idx + 1 == 8
    assert fit.current_epoch == 2


def test_dp_metrics_reach_every_logger(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path, name=name) for name in ("one", "two")]
    fit = trainer(
        DifferentialPrivacy(epsilon=2.0, delta=1e-3),
        LearningRateMonitor(),
        logger=loggers,
        max_steps=6,
        log_every_n_steps=2,
    )
    fit.fit(regressor(), loader())
    for logger in loggers:
        text = (Path(logger.log_dir) / "metrics.csv").read_text()
        for name in ("dp/epsilon", "dp/delta", "dp/noise_multiplier", "dp/steps"):
            assert name in text
        assert "noise_multiplier" in (Path(logger.log_dir) / "hparams.yaml").read_text()
    assert "dp/epsilon" in fit.progress_bar_metrics
    assert "dp/delta" not in fit.progress_bar_metrics


def test_by_name_and_by_conversion_are_the_same() -> None:
    results = []
    for strategy in ("auto", "private", PrivateSingleDeviceStrategy()):
        module = regressor()
        fit = trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=0), strategy=strategy, max_steps=3)
        fit.fit(module, loader())
        assert type(fit.strategy) is PrivateSingleDeviceStrategy
        results.append(weights(module))
    for other in results[1:]:
        assert_nearly(results[0], other, rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most


@pytest.mark.filterwarnings("ignore:The loss of a batch is neither the mean")
def test_a_training_step_that_vmap_cannot_trace_falls_back_and_says_why(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Branching(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss * 2 if loss.item() > 1 else loss

    module = Branching()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=2).fit(module, loader())
    told = [record.message for record in caplog.records if "vmap would run one by one" in record.message]
    assert len(told) == 1
    assert re.search(r"engine +loop", told[0])


def test_the_callback_can_be_pickled_before_and_after_a_run() -> None:
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    pickle.loads(pickle.dumps(private))
    trainer(private, max_steps=2).fit(regressor(), loader())
    again = pickle.loads(pickle.dumps(private))
    assert again.ledger.steps == 2


def test_a_recurrent_module_works_under_some_engine() -> None:
    class Recurrent(Regressor):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.LSTM(1, 4, batch_first=True)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self.net(batch[0].unsqueeze(-1))[0][:, -1, 0] - batch[1]).square().mean()

    module = Recurrent()
    before = weights(module).clone()
    trainer(DifferentialPrivacy(noise_multiplier=1.0), max_steps=1).fit(module, loader())
    assert not torch.equal(before, weights(module))


def test_workers_and_dict_batches() -> None:
    class Named(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.data = regression_data()

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> dict[str, Any]:
            inputs, target = self.data[index]
            return {"x": inputs, "y": target, "id": str(index)}

    class OfDicts(Regressor):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert len(batch["id"]) == len(batch["x"])
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    private = DifferentialPrivacy(noise_multiplier=1.0, seed=2)
    module = OfDicts()
    trainer(private, max_steps=3).fit(
        module, DataLoader(Named(), batch_size=16, num_workers=1, persistent_workers=True)
    )
    plain = regressor()
    same = OfDicts()
    same.load_state_dict(plain.state_dict())
    trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=2), max_steps=3).fit(
        same, DataLoader(Named(), batch_size=16)
    )
    trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=2), max_steps=3).fit(plain, loader())
    torch.testing.assert_close(weights(same), weights(plain))
