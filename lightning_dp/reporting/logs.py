"""What a logger has written of a run: CSVLogger, TensorBoardLogger or WandbLogger."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dp.reporting import event_files, wandb_files
from lightning_dp.reporting.data_set import text_of

METRICS, SETTINGS = "metrics.csv", "hparams.yaml"
Series = dict[str, list[tuple[int, float]]]


class ReportError(ValueError):
    """Logs that are missing, broken or do not belong together."""


@dataclass(frozen=True)
class Log:
    """What a logger has written of one run.

    Args:
        file: it, or the first of several.
        folder: of the run.
        logger: which one it was.
        series: the metrics.
        settings: the hyperparameters, as text in which a private run's plan begins a line with ``dp:``; ``None`` without them.
        statement: what the logger was told was spent.
    """

    file: Path
    folder: Path
    logger: str
    series: Series
    settings: str | None
    statement: dict[str, Any] | None = None


def log_in(given: Path) -> Log:
    """The log of the one run in a folder: of CSVLogger if there is one, else of TensorBoard, else of W&B."""
    for logger, pattern, read in _LOGGERS:
        files = sorted(file for file in given.rglob(pattern) if file.is_file()) if given.is_dir() else []
        folders = list(dict.fromkeys(file.parent for file in files))
        if len(folders) > 1:
            raise ReportError(
                f"{given} has {len(folders)} runs ({', '.join(map(str, folders[:3]))}): expected the folder of one run. Give "
                "each run's folder."
            )
        if not files:
            continue
        try:
            return read(files)
        except ModuleNotFoundError as error:
            raise ReportError(
                f"{files[0]} is a record of Weights & Biases, which is read by wandb: expected it to be installed. pip install "
                "'lightning-dp[wandb]' brings it."
            ) from error
        except ReportError:
            raise
        except (ValueError, OSError) as error:  # UnicodeDecodeError and json's are ValueErrors
            raise ReportError(f"{files[0]} is torn ({error}): expected a log of {logger}. Copy it again.") from error
    raise ReportError(
        f"{given} has no {METRICS}, no events.out.tfevents and no run-*.wandb: expected the folder of one run, such as "
        "runs/digits/cnn_eps8/version_0, written by Lightning's CSVLogger, TensorBoardLogger or WandbLogger. Other loggers "
        "keep their logs elsewhere: let the run write both, with Trainer(logger=[CSVLogger(...), ...])."
    )


def _of_csv(files: Sequence[Path]) -> Log:
    folder = files[0].parent
    return Log(files[0], folder, "CSVLogger", _series(files[0]), text_of(folder / SETTINGS))


def _of_tensorboard(files: Sequence[Path]) -> Log:
    """All files of a folder: a run that is resumed in it begins another one."""
    folder, found = files[0].parent, Series()
    for file in files:
        for tag, step, value in event_files.scalars(file):
            if tag not in ("epoch", "hp_metric"):
                found.setdefault(tag, []).append((step + 1, value))
    series = {tag: sorted(points, key=lambda point: point[0]) for tag, points in found.items()}
    return Log(files[0], folder, "TensorBoardLogger", series, text_of(folder / SETTINGS))


def _of_wandb(files: Sequence[Path]) -> Log:
    found, series = wandb_files.recorded(files[0]), Series()
    for row in found.history:
        step = row.get("trainer/global_step")
        for name, value in row.items():
            kept = name not in ("trainer/global_step", "epoch") and not name.startswith("_")
            if kept and isinstance(step, int) and type(value) in (int, float):
                series.setdefault(name, []).append((step + 1, float(value)))
    told = found.summary.get("privacy")
    settings = "".join(f"{name}:\n" for name in found.config)
    statement = checked(told, files[0]) if isinstance(told, dict) else None
    return Log(files[0], files[0].parent, "WandbLogger", series, settings, statement)


_LOGGERS: tuple[tuple[str, str, Callable[[Sequence[Path]], Log]], ...] = (
    ("CSVLogger", METRICS, _of_csv),
    ("TensorBoard", event_files.NAMES, _of_tensorboard),
    ("Weights & Biases", wandb_files.NAMES, _of_wandb),
)


def _series(file: Path) -> Series:
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or "step" not in rows[0]:
        raise ReportError(f"{file}: expected a column 'step' and at least one row. Let the run log something first.")
    series: Series = {}
    try:
        for row in rows:
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    series.setdefault(name, []).append((int(row["step"]) + 1, float(value)))
    except (TypeError, ValueError) as error:
        raise ReportError(f"{file} is torn ({error}): expected numbers in every column. Copy it again.") from error
    return series


def checked(found: Any, file: Path) -> dict[str, Any]:
    """A statement with what every one has, as numbers."""
    try:
        return {
            **found,
            "epsilon": float(found["epsilon"]),
            "delta": float(found["delta"]),
            "dataset_size": int(found["dataset_size"]),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise torn(file, error) from error


def torn(file: Path, error: Exception) -> ReportError:
    """What to say of a statement that cannot be read."""
    return ReportError(
        f"{file} is torn ({type(error).__name__}: {error}): expected the statement of a run. Copy it again, or remove it "
        "to have the run drawn as one whose ε is not known."
    )
