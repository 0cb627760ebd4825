"""The command ``lightning-dp report``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from lightning_dp.reporting.facts import TASKS
from lightning_dp.reporting.figures import accuracy_against_epsilon, budget_by_step, validation_by_step
from lightning_dp.reporting.logs import ReportError
from lightning_dp.reporting.page import page
from lightning_dp.reporting.runs import read_runs
from lightning_dp.version import __version__


def run(words: Sequence[str]) -> None:
    """Run ``lightning-dp report``.

    Args:
        words: the command line after ``report``.

    Raises:
        SystemExit: a folder has no readable run, or matplotlib is missing; the message says what to do.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dp report", description="Draw finished runs from their own logs: PNG files and one HTML page."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, as its logger wrote it")
    parser.add_argument(
        "--without-privacy",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="folder of one more run, which was trained without privacy",
    )
    parser.add_argument("--metric", default="val/accuracy", help="the column to draw (default val/accuracy)")
    parser.add_argument("--beside", choices=sorted(TASKS), help="published figures to draw beside the runs")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write into (default report)")
    args = parser.parse_args(words)
    beside = (args.beside, TASKS[args.beside]) if args.beside else None
    published = beside[1].curves if beside else ()
    try:
        runs = read_runs(args.runs, args.metric, args.without_privacy, beside)
        pictures = {"accuracy": accuracy_against_epsilon(runs, args.metric, published)}
        captions = {"accuracy": f"{args.metric} against ε"}
        if any("dp/epsilon" in run.series for run in runs):
            pictures["budget"], captions["budget"] = budget_by_step(runs), "Budget spent by step"
        pictures["validation"], captions["validation"] = validation_by_step(runs, args.metric), f"{args.metric} by step"
    except ReportError as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for name, png in pictures.items():
        (args.out / f"{name}.png").write_bytes(png)
    made = f"Made on {datetime.now(UTC):%Y-%m-%d, %H:%M} UTC by lightning_dp {__version__}"
    html = page(runs, args.metric, {name: (captions[name], png) for name, png in pictures.items()}, published, made)
    (args.out / "index.html").write_text(html, encoding="utf-8")
    print(f"{args.out / 'index.html'} and {len(pictures)} pictures beside it")
