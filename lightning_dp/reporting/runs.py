"""A finished run, read from the folder its logger wrote."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS, STATEMENT = "metrics.csv", "privacy.json"
_OF_OTHER_LOGGERS = ("*.wandb", "events.out.tfevents.*")


class ReportError(ValueError):
    """Logs that are missing, broken or do not belong together."""


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Args:
        name: for people: the folder.
        series: for each column of ``metrics.csv`` its (step, value) pairs, in order.
        statement: ``privacy.json``, or ``None`` for a run without privacy.
        averaged: whether validation saw averaged weights; ``None`` if the folder does not say.
    """

    name: str
    series: dict[str, list[tuple[int, float]]]
    statement: dict[str, Any] | None
    averaged: bool | None

    @property
    def epsilon(self) -> float:
        """ε spent; ``math.inf`` without privacy."""
        return math.inf if self.statement is None else float(self.statement["epsilon"])

    @property
    def is_simulation(self) -> bool:
        """Whether the run only simulated another one."""
        return self.statement is not None and self.statement.get("simulation") is not None


def read_runs(folders: Sequence[Path], metric: str) -> list[Run]:
    """Read the runs in ``folders``.

    Args:
        folders: each holds ``metrics.csv`` of Lightning's CSVLogger and, for private runs, ``privacy.json``, or one folder
            below it does.
        metric: the column that will be drawn.

    Raises:
        ReportError: there are no logs, or several runs in one folder; a file is torn; the column is unknown; or the runs are
            about different numbers of training examples, so not about the same data.
    """
    runs = [_read(folder, metric) for folder in folders]
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
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8") if config.is_file() else None
    return Run(str(given), series, _statement(folder / STATEMENT), None if text is None else "MovingAverage" in text)


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


def _statement(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
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
            "to have the run drawn as one without privacy."
        ) from error
