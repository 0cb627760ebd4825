"""Figures of ε at the end of a fit, in the loggers that take them: true numbers, one rank, and never in the way."""

from __future__ import annotations

import importlib.util
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Ledger
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record import logged_figures
from lightning_dp.record.logged_figures import figures_of
from tests.conftest import loader, regressor, trainer
from tests.tracking.test_loggers import Client, WithoutServer

BY_STEP, BY_EPSILON = "dp/epsilon_by_step", "dp/val_loss_by_epsilon"


class Board(TensorBoardLogger):
    """Lightning's own logger, with a writer that keeps everything here."""

    def __init__(self, broken: bool = False) -> None:
        Logger.__init__(self)
        self.broken, self.figures = broken, {}

    experiment = property(lambda self: self)
    log_dir = save_dir = root_dir = property(lambda self: "board")
    name = version = "board"

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...
    def log_metrics(self, *_: Any, **__: Any) -> None: ...
    def log_graph(self, *_: Any, **__: Any) -> None: ...
    def add_text(self, *_: Any) -> None: ...
    def save(self) -> None: ...
    def finalize(self, status: str) -> None: ...

    def add_figure(self, name: str, figure: Any, global_step: int) -> None:
        if self.broken:
            raise ConnectionError("no way to the board")
        self.figures[name] = (figure, global_step)


class Validated(type(regressor())):
    """Logs the number of private steps as its validation loss, and others that are not drawn."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        values = {"val_loss": float(self.global_step), "val_time": 1.0, "seen_loss": 2.0}
        self.log_dict({name: torch.tensor(value) for name, value in values.items()}, batch_size=1)
        self.log("val_loss_hidden", 1.0, logger=False, batch_size=1)
        self.log_dict({"value_loss": 1.0, "interval_loss": 1.0}, batch_size=1)


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"epsilon": 2.0, "delta": 1e-3, "engine": "vmap", **options})


def fit(logger: Any, callback: DifferentialPrivacy, **options: Any) -> None:
    settings: dict[str, Any] = {
        "max_steps": 6, "log_every_n_steps": 2, "val_check_interval": 2, "check_val_every_n_epoch": None,
        "limit_val_batches": 1, "num_sanity_val_steps": 1, **options,
    }  # fmt: skip
    trainer(callback, logger=logger, **settings).fit(Validated(), loader(), loader())


def points(figure: Any, line: int = 0) -> list[tuple[float, float]]:
    return [tuple(point) for point in figure.axes[0].lines[line].get_xydata()]


def test_epsilon_by_step_and_the_metric_by_epsilon_reach_the_loggers_once() -> None:
    board, client, callback = Board(), Client(), private()
    fit([board, WithoutServer(client)], callback)
    assert set(board.figures) == {BY_STEP, BY_EPSILON}
    assert set(client.figures) == {"dp/epsilon_by_step.png", "dp/val_loss_by_epsilon.png"}
    figure, step = board.figures[BY_STEP]
    assert step == 6
    ledger = callback.ledger
    assert ledger is not None
    spent = points(figure)
    assert spent == [(step, ledger.epsilon(int(step)).epsilon) for step, _ in spent]
    assert figure.axes[0].lines[0].get_drawstyle() == "steps-pre"  # ε is concave: a chord would be below it
    assert spent[-1] == (6, callback.statement().epsilon)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in pairwise(spent))
    assert [y for _, y in points(figure, 1)] == [2.0, 2.0]  # the budget
    assert points(board.figures[BY_EPSILON][0]) == [(ledger.epsilon(n).epsilon, float(n)) for n in (2, 4, 6)]
    fit([board], second := private(simulate=2), max_steps=2)
    assert board.figures[BY_STEP][0].axes[0].get_title().startswith("SIMULATION at 1/2 of batch and noise")
    assert points(board.figures[BY_EPSILON][0])[-1][0] == second.statement().epsilon


@pytest.mark.parametrize("what", ["logger", "drawing"])
def test_what_goes_wrong_is_a_warning(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no way to draw")

    if what == "drawing":
        monkeypatch.setattr(logged_figures, "draw", refuse)
    with pytest.warns(UserWarning, match=r"figures of ε .*ConnectionError: no way to") as seen:
        fit(Board(broken=what == "logger"), callback := private())
    assert sum("figures of ε" in str(one.message) for one in seen) == 1
    assert json.loads(Path("board/privacy.json").read_text())["state"] == "ended"
    assert callback.statement().steps == 6


def test_nothing_is_drawn_where_nothing_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"clip_norm": 1.0, "delta": 1e-3, "dataset_size": 64, "expected_batch_size": 8}
    ledger = Ledger(PrivacyPlan(noise_multiplier=0.0, **plan))
    ledger.charge()
    assert figures_of(ledger, {"val_loss": [(1, 0.5)]}, 1) == {}
    ledger = Ledger(PrivacyPlan(noise_multiplier=1.0, **plan))
    ledger.charge()
    assert set(figures_of(ledger, {"val_loss": [(1, math.nan)]}, 1)) == {BY_STEP}
    with monkeypatch.context() as patch:
        patch.setattr(rank_zero_only, "rank", 1, raising=False)
        logged_figures.tell_figures(None, ledger, None)
    monkeypatch.setattr(
        logged_figures, "find_spec", lambda name: None if name == "matplotlib" else importlib.util.find_spec(name)
    )
    fit(board := Board(), private(), max_steps=2)
    assert not board.figures


def test_long_runs_and_slow_accountants_are_drawn_where_epsilon_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"clip_norm": 1.0, "delta": 1e-5, "dataset_size": 10**5, "expected_batch_size": 100}
    ledger = Ledger(PrivacyPlan(noise_multiplier=2.0, **plan))
    ledger.load_state_dict({**ledger.state_dict(), "phases": [{**ledger.numbers, "steps": 20_010}]})
    monkeypatch.setattr(logged_figures, "SECONDS", -1.0)
    steps = logged_figures._steps(ledger, 50)
    assert steps[-1] == 20_010
    assert 100 < len(steps) <= logged_figures.MOST_POINTS + 2
    assert all(step % 50 == 0 for step in steps[:-1])
