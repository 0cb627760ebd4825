"""A finished run, read from the folder its logger wrote."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_dp.record.journal import FILE_NAME as JOURNAL
from lightning_dp.record.written import records_in
from lightning_dp.reporting.data_set import CONFIG, data_set_in, short_names, text_of, why_not_beside
from lightning_dp.reporting.facts import Task
from lightning_dp.reporting.logs import Log, ReportError, Series, checked, log_in, torn


@dataclass(frozen=True)
class Run:
    """What one run logged.

    Args:
        name: the folder, as it was given.
        series: for each metric its (step, value) pairs, in order.
        statement: ``privacy.json``, or ``None`` if there is none.
        averaged: whether validation saw averaged weights; ``None`` if the folder does not say.
        private: whether the run was trained privately; ``None`` if the folder does not say.
        logger: which logger wrote ``series``.
        data: the data set, if it is one that comes with the package and the folder says so.
        label: for people: what tells the run from the others.
    """

    name: str
    series: Series
    statement: dict[str, Any] | None
    averaged: bool | None
    private: bool | None = None
    logger: str = "CSV"
    data: str | None = None
    label: str = ""

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

    @property
    def size(self) -> int | None:
        """N, if it is known."""
        return None if self.statement is None else self.statement["dataset_size"]


def read_runs(
    folders: Sequence[Path], metric: str, plain: Sequence[Path] = (), beside: tuple[str, Task] | None = None
) -> list[Run]:
    """Read the runs in ``folders``.

    A run without a statement is one without privacy only if its folder shows that, by hyperparameters without a plan
    or a ``config.yaml`` without the callback, or if it is said to be one. Otherwise ε is not known.

    Args:
        folders: each holds one run, or one folder below it does: ``metrics.csv`` of Lightning's CSVLogger, TensorBoard's
            event files, or W&B's record; and, for private runs, ``privacy.json``, which W&B's record has within.
        metric: the column that will be drawn.
        plain: folders of more runs, which were trained without privacy.
        beside: the name of a task and its published figures, which must be about the same data.

    Raises:
        ReportError: there are no logs, or several runs or statements in one folder; a file is torn; the column is unknown; a
            run said to be without privacy is a private one; or the runs are about different data sets, or another than
            ``beside``.
    """
    runs = [_read(folder, metric) for folder in folders] + [_without_privacy(_read(folder, metric)) for folder in plain]
    for what in ("data", "size"):
        found = {run.name: getattr(run, what) for run in runs if getattr(run, what) is not None}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{name}: {one}" for name, one in found.items())
            raise ReportError(
                f"runs of different data sets ({listed}{' training examples' if what == 'size' else ''}): expected runs that "
                "can be compared. Make a report for each data set."
            )
    if beside is not None:
        for run in runs:
            if why := why_not_beside(run.name, run.data, run.size, *beside):
                raise ReportError(f"--beside {beside[0]}: {why} Leave --beside out, or name another task.")
    names = short_names([Path(run.name) for run in runs])
    return [replace(run, label=name) for run, name in zip(runs, names, strict=True)]


def _read(given: Path, metric: str) -> Run:
    log = log_in(given)
    if not log.series:
        raise ReportError(f"{log.file} holds no metric: expected at least one. Let the run log something first.")
    if metric not in log.series:
        known = ", ".join(sorted(name for name in log.series if not name.startswith("dp/")))
        raise ReportError(f"metric={metric!r} is no column of {log.file}: expected one of {known}. Give --metric.")
    config, statement = text_of(log.folder / CONFIG), log.statement or _statement(log.folder, log.file)
    averaged = None if config is None else "MovingAverage" in config
    private = True if statement is not None else _was_private(log, config)
    return Run(str(given), log.series, statement, averaged, private, log.logger, data_set_in(config))


def _was_private(log: Log, config: str | None) -> bool | None:
    """Whether a run without a statement was trained privately, as far as its folder shows."""
    if any(name.startswith("dp/") for name in log.series) or (log.folder / JOURNAL).exists():
        return True
    if any(line.startswith("dp:") for line in (log.settings or "").splitlines()):  # every private run logs its plan
        return True
    if "DifferentialPrivacy" in (config or ""):
        return True
    return None if config is None and log.settings is None else False


def _without_privacy(run: Run) -> Run:
    if run.private:
        raise ReportError(
            f"--without-privacy {run.name}: expected a run without privacy, but its folder has what only private runs write. "
            "Give it as any other run."
        )
    return replace(run, private=False)


def _statement(folder: Path, log: Path) -> dict[str, Any] | None:
    files = records_in(folder)
    if len(files) > 1:
        raise ReportError(
            f"{folder} has {len(files)} statements ({', '.join(file.name for file in files[:3])}): expected one, that of the "
            f"run behind {log.name}. Several runs used this folder, and none of these speaks of them all. Give every run a "
            "folder of its own."
        )
    if not files:
        return None
    (file,) = files
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise torn(file, error) from error
    return checked(found, file)
