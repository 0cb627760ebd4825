"""What a run shows of how far it is: a bar over all steps, and once how many minutes are left."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import pytorch_lightning

from lightning_dp import DifferentialPrivacy, StepProgressBar
from lightning_dp.record import pace
from lightning_dp.record.pace import Pace
from tests.conftest import loader, regressor, trainer


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What the bar said last."""
    return re.split(r"[\r\n]+", capsys.readouterr().out.strip())[-1]


@pytest.mark.parametrize("end", [{"max_steps": 10}, {"max_epochs": 3, "max_steps": -1}])
@pytest.mark.parametrize("last", [True, False])
def test_one_bar_over_all_epochs_with_epsilon(
    end: dict[str, int], last: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    private, bar = DifferentialPrivacy(noise_multiplier=1.0), StepProgressBar(refresh_rate=3)
    both = (private, bar) if last else (bar, private)
    fit = trainer(*both, enable_progress_bar=True, log_every_n_steps=1, **end)
    fit.fit(regressor(), loader(), loader())
    steps = fit.global_step
    assert steps == end.get("max_steps", 10) or steps == 3 * len(loader())
    line = shown(capsys)
    assert line.startswith("Steps: 100%")
    assert f"| {steps}/{steps} [" in line
    assert f"dp/epsilon={private.statement().epsilon:.3g}"[:15] in line
    assert "Epoch" not in line


def test_the_bar_goes_on_where_a_checkpoint_was_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = trainer(max_steps=4)
    first.fit(regressor(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    starts: list[tuple[int, int | None]] = []

    class Watched(StepProgressBar):
        def on_train_start(self, *rest: Any) -> None:
            super().on_train_start(*rest)
            starts.append((self.train_progress_bar.n, self.train_progress_bar.total))

    fit = trainer(Watched(), enable_progress_bar=True, max_steps=6)
    fit.fit(regressor(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert starts == [(4, 6)]
    assert "| 6/6 [" in shown(capsys)


def test_it_changes_nothing_but_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    weights = []
    for bars in ((), (StepProgressBar(),), (StepProgressBar(refresh_rate=0),)):
        L.seed_everything(0, verbose=False)
        module = regressor()
        options = {"enable_progress_bar": bool(bars), "max_steps": 3}
        trainer(DifferentialPrivacy(noise_multiplier=1.0, seed=1), *bars, **options).fit(module, loader())
        weights.append([parameter.tolist() for parameter in module.parameters()])
    assert weights[0] == weights[1] == weights[2]


def test_a_bar_of_the_other_root_is_refused() -> None:
    fit: Any = pytorch_lightning.Trainer(max_steps=1, logger=False, accelerator="cpu", enable_checkpointing=False)
    with pytest.raises(
        TypeError, match=r"StepProgressBar with a Trainer of pytorch_lightning: expected one of lightning"
    ):
        StepProgressBar().setup(fit, regressor(), "fit")


class Clock:
    """Each question takes ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds

    def monotonic(self) -> float:
        self.now += self.seconds
        return self.now


@pytest.mark.parametrize(
    ("seconds", "left", "said"),
    [
        (2.0, 1000, ["about 33 minutes for 997 steps", "2 s a step, as were the first 3"]),
        (0.5, 1000, ["about 8 minutes for 990 steps", "0.5 s a step, as were the first 10"]),
        (2.0, 20, []),  # over sooner than it is worth saying
        (100.0, 1000, ["about 28 h for 997 steps", "100 s a step, as were the first 3"]),
    ],
)
def test_how_long_it_takes_is_said_once(
    seconds: float, left: int, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    panels: list[dict[str, str]] = []
    monkeypatch.setattr(pace, "time", Clock(seconds))
    monkeypatch.setattr(pace, "show", lambda title, rows: panels.append(rows))
    told = Pace()
    for steps in range(left, left - 20, -1):
        told.step(steps)
    assert [list(rows.values()) for rows in panels] == ([said] if said else [])
    Pace().step(None)


@pytest.mark.parametrize("logs", [True, False])
def test_a_fit_says_it_unless_what_depends_on_the_draws_is_kept_back(
    logs: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pace, "time", Clock(20.0))
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        trainer(DifferentialPrivacy(noise_multiplier=1.0, log_train_metrics=logs), max_steps=9).fit(
            regressor(), loader()
        )
    assert ("left  about 2 minutes for 5 steps" in caplog.text.replace("   ", " ")) is logs
