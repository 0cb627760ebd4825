"""The command ``lightning-dp statement``: whether what a run says it has spent follows from what it has charged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_dp.accounting.risk import finite, in_lines, round_up
from lightning_dp.record.recompute import Recomputed, recompute
from lightning_dp.record.written import FILE_NAME, records_in


def run(words: Sequence[str]) -> None:
    """Run ``lightning-dp statement``; ends the process with 1 if a statement does not hold.

    Args:
        words: the command line after ``statement``.

    Raises:
        SystemExit: a file cannot be read, or a statement does not hold.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dp statement",
        description="Compute a run's statement again from what its journal says was charged, and say whether it holds.",
        epilog="Ends with 0 if it holds and with 1 if it does not. The journal is looked for beside the file, above it, and "
        "in the folders beside its own.",
    )
    parser.add_argument("file", type=Path, metavar="PRIVACY.JSON", help="of a run, or the folder it is in")
    parser.add_argument(
        "--journal", type=Path, action="append", default=[], metavar="FILE", help="privacy.journal of a fit; repeatable"
    )
    parser.add_argument(
        "--without-journal",
        action="store_true",
        help="take the file's word for its steps, and check what follows from them",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object for each file instead of sentences")
    args = parser.parse_args(words)
    if args.journal and args.without_journal:
        parser.error("--journal with --without-journal: expected one of the two.")
    files = (records_in(args.file) or [args.file / FILE_NAME]) if args.file.is_dir() else [args.file]
    try:
        found = [recompute(file, args.journal, without_journal=args.without_journal) for file in files]
    except ValueError as error:
        parser.error(str(error))
    for one in found:
        print(json.dumps(_as_json(one), ensure_ascii=False) if args.json else _in_words(one))
    if not all(one.holds for one in found):
        sys.exit(1)


def _as_json(found: Recomputed) -> dict[str, Any]:
    again = found.statement
    interval = None if found.interval is None else list(found.interval)
    said = {name: found.record.content[name] for name in ("epsilon", "delta", "steps")}
    numbers = {"epsilon": again.epsilon, "delta": again.delta, "steps": again.steps, "accountant": again.accountant}
    recomputed = {**numbers, "risk": None if again.risk is None else again.risk.to_dict()}
    return {
        "file": str(found.record.file),
        "holds": found.holds,
        "wrong": list(found.wrong),
        "notes": list(found.notes),
        "said": said,
        "recomputed": finite(recomputed),
        "epsilon_prv_accountant": interval,
    }


def _in_words(found: Recomputed) -> str:
    record, again = found.record, found.statement
    run = record.content.get("run") or {}
    whose = f", run {run['id']}, begun {run['begun']}" if run.get("id") else ""
    source = {None: "of the file's own word", 1: "of 1 fit in the journal"}.get(
        found.fits, f"of {found.fits} fits in journals"
    )
    theirs = (
        "has no law of these steps" if found.interval is None else "ε between {:.4g} and {:.4g}".format(*found.interval)
    )
    lines = [
        f"{record.file} ({record.state}{whose})",
        f"  said            ε = {round_up(float(record.content['epsilon']))} after {_steps(record.steps)}",
        f"  recomputed      {again}",
        f"                  {source}",
        f"  prv-accountant  {theirs}",
    ]
    if again.risk is not None:
        lines.append(in_lines(again.risk, again.unit))
    lines += [f"  note: {note}" for note in found.notes]
    lines += [f"  wrong: {one}" for one in found.wrong]
    return "\n".join([*lines, "The statement holds." if found.holds else "The statement does not hold."])


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
