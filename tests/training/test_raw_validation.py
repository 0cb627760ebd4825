"""One run that validates both on the average and on the weights as trained is two runs that validate on one each."""

from __future__ import annotations

import contextlib
import csv
import os
import pickle
import pty
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import rich
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torchmetrics import MeanSquaredError

from lightning_dp import DifferentialPrivacy, ExponentialMovingAverage
from tests.conftest import Regressor, loader, regression_data, regressor, trainer, weights
from tests.nearly import assert_nearly

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]
NAMES = {"val/loss", "val/mse", "val/noisy", "val/all", "val/hidden", "val/step_epoch"}


class Reporting(Regressor):
    """Logs in every way there is: a value, a metric, something random, at the end of the epoch, for callbacks alone."""

    def __init__(self) -> None:
        super().__init__()
        self.load_state_dict(regressor().state_dict(), strict=False)
        self.mse = MeanSquaredError()
        self.outputs: list[Any] = []
        self.hooks: Counter[str] = Counter()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, targets = batch
        outputs = self.net(inputs).squeeze(-1)
        loss = torch.nn.functional.mse_loss(outputs, targets)
        self.mse(outputs, targets)
        self.log_dict({"val/loss": loss, "val/mse": self.mse})
        self.log("val/noisy", (outputs + torch.randn_like(outputs)).mean())
        self.log("val/hidden", 2 * loss, logger=False, prog_bar=True)
        self.log("val/step", loss, on_step=True, on_epoch=True)
        self.outputs.append(outputs)
        assert not self.training

    def on_validation_epoch_end(self) -> None:
        self.log("val/all", torch.cat(self.outputs).mean())
        self.outputs.clear()
        self.hooks["epoch_end"] += 1
        for logger in self.loggers:
            logger.experiment.log_metrics({"by hand": self.hooks["epoch_end"]}, step=self.global_step)


class Watch(L.Callback):
    """What monitoring callbacks see, and how often."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.hooks: Counter[str] = Counter()

    def on_validation_start(self, *_: Any) -> None:
        self.hooks["start"] += 1

    def on_validation_batch_end(self, *_: Any) -> None:
        self.hooks["batch_end"] += 1

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append({name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val")})


def run(*callbacks: Any, steps: int = 8, ckpt_path: Any = None, **options: Any) -> tuple[Any, Watch]:
    torch.manual_seed(3)
    module, watch = Reporting(), Watch()
    private = DifferentialPrivacy(noise_multiplier=1.0, seed=1)
    options = {"max_steps": steps, "val_check_interval": 2, "check_val_every_n_epoch": None, **options}
    trainer(private, *callbacks, watch, **options).fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module, watch


def both(**options: Any) -> ExponentialMovingAverage:
    return ExponentialMovingAverage(0.9, validate_raw=True, **options)


def test_it_gives_the_metrics_of_two_runs_and_changes_nothing_else() -> None:
    module, watch = run(both())
    averaged, plain_watch = run(ExponentialMovingAverage(0.9))
    _, raw_watch = run()
    assert len(watch.seen) == 4
    for here, average, raw in zip(watch.seen, plain_watch.seen, raw_watch.seen, strict=True):
        assert {name: here[name] for name in average} == pytest.approx(average, rel=1e-5, abs=1e-6)  # of float32
        for name in NAMES - {"val/noisy"}:
            assert here[f"{name}_raw"] == pytest.approx(raw[name], rel=1e-6)
        assert {name for name in here if name.endswith("_raw")} == {*(f"{name}_raw" for name in NAMES), "val/step_raw"}
        assert here["val/loss_raw"] != here["val/loss"]
        assert here["val/noisy_raw"] - here["val/all_raw"] == pytest.approx(
            here["val/noisy"] - here["val/all"], abs=1e-5
        )
    assert_nearly(weights(module), weights(averaged), rtol=1e-5, atol=1e-6)  # float32, in another order of sums at most
    assert watch.hooks == plain_watch.hooks
    assert module.hooks["epoch_end"] == 1 + 2 * 4, "once in the sanity check, and twice a validation"
    assert "run" not in vars(module.trainer.fit_loop.epoch_loop.val_loop), "the Trainer is left as it was found"
    assert module.training


@pytest.mark.filterwarnings("ignore:EarlyStopping.* decides when training ends by a metric without noise")
def test_callbacks_monitor_it_and_loggers_get_one_row(tmp_path: Path) -> None:
    save = ModelCheckpoint(tmp_path, monitor="val/loss_raw", save_top_k=1, filename="{step}")
    stop = EarlyStopping("val/loss_raw", patience=0, mode="max")
    log = CSVLogger(tmp_path)
    module, watch = run(both(), save, stop, logger=log, enable_checkpointing=True)
    losses = [seen["val/loss_raw"] for seen in watch.seen]
    assert float(save.best_model_score) == pytest.approx(min(losses), rel=1e-6)
    assert len(losses) == 1 + next(i for i in range(1, len(losses)) if losses[i] <= max(losses[:i]))
    with (Path(log.log_dir) / "metrics.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["val/all"]]
    assert [float(row["val/loss_raw"]) for row in rows] == pytest.approx(losses)
    assert "val/hidden_raw" not in rows[0]
    assert module.hooks["epoch_end"] > len(rows)


def test_a_resumed_run_goes_on_with_both(tmp_path: Path) -> None:
    def save() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, monitor="val/loss_raw", save_top_k=-1, filename="{step}")

    whole, watched = run(both(), save(), enable_checkpointing=True)
    resumed, rest = run(both(), save(), enable_checkpointing=True, ckpt_path=tmp_path / "step=4.ckpt")
    for name in NAMES - {"val/noisy"}:
        for suffix in ("", "_raw"):
            expected = [seen[name + suffix] for seen in watched.seen[-2:]]
            assert [seen[name + suffix] for seen in rest.seen[-2:]] == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights(resumed), weights(whole), rtol=1e-5, atol=1e-6)


def test_several_loaders_and_a_limit() -> None:
    class Two(Regressor):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    module = Two()
    other = loader(regression_data(seed=5))
    fit = trainer(both(), limit_val_batches=2)
    fit.fit(module, loader(), [loader(), other])
    wanted = {f"val/loss{how}/dataloader_idx_{index}" for how in ("", "_raw") for index in (0, 1)}
    assert wanted == {name for name in fit.callback_metrics if name.startswith("val")}
    assert len({float(fit.callback_metrics[name]) for name in wanted}) == 4


def test_an_error_leaves_trainer_and_module_as_they_were() -> None:
    class Fails(Regressor):
        fails = True

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails and not self.trainer.sanity_checking:
                raise RuntimeError("no such picture.")
            super().validation_step(batch, batch_idx)

    module, watch, private = Fails(), Watch(), DifferentialPrivacy(noise_multiplier=1.0)
    fit = trainer(private, both(), watch, max_steps=4)
    with pytest.raises(RuntimeError, match="no such picture"):
        fit.fit(module, loader(), loader())
    assert watch in fit.callbacks
    assert "run" not in vars(fit.fit_loop.epoch_loop.val_loop)


def test_it_costs_nothing_unless_asked_for_and_takes_a_truth_value() -> None:
    module, watch = run(ExponentialMovingAverage(0.9))
    assert module.hooks["epoch_end"] == 1 + len(watch.seen)
    assert pickle.loads(pickle.dumps(both())).decay == 0.9
    with pytest.raises(ValueError, match="validate_raw='yes': expected True or False"):
        ExponentialMovingAverage(0.9, validate_raw="yes")


class Rendered(RichProgressBar):
    """A bar that can be waited for until it is drawn, by a thread of its own if it has one."""

    def draw(self) -> bool:
        assert self.progress is not None
        thread = self.progress.live._refresh_thread
        if thread is None:  # Lightning 2.6.0 draws where it trains
            return True
        thread.refresh_cond = True
        while thread.refresh_cond and thread.is_alive():
            time.sleep(0.01)
        return thread.is_alive()


class ReadFromAThread(Regressor):
    """Validates while another thread draws the bar, and reads callbacks and loggers itself."""

    def __init__(self, bar: Rendered) -> None:
        super().__init__()
        self.bar = bar
        self.drawn: list[bool] = []
        self.folders: set[Any] = set()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not self.trainer.sanity_checking:
            self.drawn.append(self.bar.draw())
            assert self.bar in self.trainer.callbacks
            self.folders.add(self.trainer.log_dir)
            self.folders.add(self.logger.log_dir if self.logger is not None else None)


def read_all(screen: int, seen: list[bytes]) -> None:
    with contextlib.suppress(OSError):  # how Linux says that the terminal was closed
        while piece := os.read(screen, 65536):
            seen.append(piece)


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_progress_bar_lives_on_in_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen, terminal = pty.openpty()
    seen: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(screen, seen), daemon=True)
    reader.start()
    with os.fdopen(terminal, "w") as written:
        assert written.isatty()
        monkeypatch.setattr(sys, "stdout", written)
        monkeypatch.setenv("TERM", "xterm-256color")
        rich.reconfigure(width=200)
        bar, log = Rendered(), CSVLogger(tmp_path)
        module = ReadFromAThread(bar)
        often = {"val_check_interval": 2, "check_val_every_n_epoch": None}
        try:
            trainer(both(), bar, logger=log, enable_progress_bar=True, **often).fit(module, loader(), loader())
        finally:
            monkeypatch.undo()
            rich.reconfigure()
    reader.join()
    text = b"".join(seen).decode()
    assert "Traceback" not in text
    assert "4/4" in text, "the bar came to its end"
    assert len(module.drawn) == 2 * 2 * 4, "two validations of four batches, each twice"
    assert all(module.drawn), "the bar's thread has ended before the run did"
    assert module.folders == {log.log_dir}


def test_other_threads_find_the_trainer_whole() -> None:
    class Asks(Regressor):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            asking = threading.Thread(target=lambda: seen.append((list(fit.callbacks), list(fit.loggers))))
            asking.start()
            asking.join()

    seen: list[Any] = []
    fit = trainer(both(), logger=CSVLogger("."), max_steps=4)
    whole = (list(fit.callbacks), list(fit.loggers))
    fit.fit(Asks(), loader(), loader())
    assert len(seen) > 8
    assert all(found == whole for found in seen)
