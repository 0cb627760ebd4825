"""A finished run, read from the folder its logger wrote."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_dp.record.journal import FILE_NAME as JOURNAL
from lightning_dp.record.written import records_in

METRICS, SETTINGS, CONFIG = "metrics.csv", "hparams.yaml", "config.yaml"
_OF_OTHER_LOGGERS = ("*.wandb", "events.out.tfevents.*")


class ReportError(ValueError):
    """Logs that are missing, broken or do not belong together."""


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Args:
        name: for people: the folder.
        series: for each column of ``metrics.csv`` its (step, value) pairs, in order.
        statement: ``privacy.json``, or ``None`` if there is none.
        averaged: whether validation saw averaged weights; ``None`` if the folder does not say.
        private: whether the run was trained privately; ``None`` if the folder does not say.
    """

    name: str
    series: dict[str, list[tuple[int, float]]]
    statement: dict[str, Any] | None
    averaged: bool | None
    private: bool | None = None

    @property
    def epsilon(self) -> float:
        """ε spent; ``math.inf`` without privacy, and ``math.nan`` if nothing in the folder says how much it is."""
        if self.statement is not None:
            return float(self.statement["epsilon"])
        return math.inf if self.private is False else math.nan

    @property
    def is_simulation(self) -> bool:
        """Whether the run only simulated another one."""
        return self.statement is not None and self.statement.get("simulation") is not None


def read_runs(folders: Sequence[Path], metric: str, plain: Sequence[Path] = ()) -> list[Run]:
    """Read the runs in ``folders``.

    A run without ``privacy.json`` is one without privacy only if its folder shows that, by an ``hparams.yaml`` without a plan
    or a ``config.yaml`` without the callback, or if it is said to be one. Otherwise ε is not known.

    Args:
        folders: each holds ``metrics.csv`` of Lightning's CSVLogger and, for private runs, ``privacy.json``, or one folder
            below it does.
        metric: the column that will be drawn.
        plain: folders of more runs, which were trained without privacy.

    Raises:
        ReportError: there are no logs, or several runs or statements in one folder; a file is torn; the column is unknown; a
            run said to be without privacy is a private one; or the runs are about different numbers of training examples, so
            not about the same data.
    """
    runs = [_read(folder, metric) for folder in folders] + [_without_privacy(_read(folder, metric)) for folder in plain]
    sizes = {run.name: run.statement["dataset_size"] for run in runs if run.statement is not None}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name}: {size}" for name, size in sizes.items())
        raise ReportError(
            f"runs of different data sets ({listed} training examples): expected runs that can be compared. Make a report for "
            "each data set."
        )
    return runs


def _read(given: Path, metric: str) -> Run:
    found = sorted(given.rglob(METRICS)) if given.is_dir() else []
    if len(found) != 1:
        what = (
            "has no " + METRICS
            if not found
            else f"has {len(found)} runs ({', '.join(str(f.parent) for f in found[:3])})"
        )
        remedy = "Give each run's folder."
        if not found and given.is_dir() and any(next(given.rglob(kind), None) for kind in _OF_OTHER_LOGGERS):
            remedy = (
                "There are logs of Weights & Biases or TensorBoard here, which only those can read: let the run write both, "
                "with Trainer(logger=[CSVLogger(...), ...])."
            )
        raise ReportError(
            f"{given} {what}: expected the folder of one run, such as runs/digits/cnn_eps8/version_0, written by "
            f"lightning.pytorch.loggers.CSVLogger. {remedy}"
        )
    folder = found[0].parent
    series = _series(found[0])
    if metric not in series:
        known = ", ".join(sorted(name for name in series if not name.startswith("dp/")))
        raise ReportError(f"metric={metric!r} is no column of {found[0]}: expected one of {known}. Give --metric.")
    statement, text = _statement(folder), _text(folder / CONFIG)
    averaged = None if text is None else "MovingAverage" in text
    private = True if statement is not None else _was_private(folder, series)
    return Run(str(given), series, statement, averaged, private)


def _was_private(folder: Path, series: dict[str, list[tuple[int, float]]]) -> bool | None:
    """Whether a run without a statement was trained privately, as far as its folder shows."""
    config, settings = _text(folder / CONFIG), _text(folder / SETTINGS)
    if any(name.startswith("dp/") for name in series) or (folder / JOURNAL).exists():
        return True
    if any(line.startswith("dp:") for line in (settings or "").splitlines()):  # every private run logs its plan
        return True
    if "DifferentialPrivacy" in (config or ""):
        return True
    return None if config is None and settings is None else False


def _without_privacy(run: Run) -> Run:
    if run.private:
        raise ReportError(
            f"--without-privacy {run.name}: expected a run without privacy, but its folder has what only private runs write. "
            "Give it as any other run."
        )
    return replace(run, private=False)


def _text(file: Path) -> str | None:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def _series(file: Path) -> dict[str, list[tuple[int, float]]]:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or "step" not in rows[0]:
        raise ReportError(f"{file}: expected a column 'step' and at least one row. Let the run log something first.")
    series: dict[str, list[tuple[int, float]]] = {}
    try:
        for row in rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    except (TypeError, ValueError) as error:
        raise ReportError(f"{file} is torn ({error}): expected numbers in every column. Copy it again.") from error
    return series


def _statement(folder: Path) -> dict[str, Any] | None:
    files = records_in(folder)
    if len(files) > 1:
        raise ReportError(
            f"{folder} has {len(files)} statements ({', '.join(file.name for file in files[:3])}): expected one, that of the "
            f"run behind {METRICS}. Several runs used this folder, and none of these speaks of them all. Give every run a "
            "folder of its own."
        )
    if not files:
        return None
    (file,) = files
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return {
            **found,
            "epsilon": float(found["epsilon"]),
            "delta": float(found["delta"]),
            "dataset_size": found["dataset_size"],
        }
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{file} is torn ({type(error).__name__}: {error}): expected the statement of a run. Copy it again, or remove it "
            "to have the run drawn as one whose ε is not known."
        ) from error
