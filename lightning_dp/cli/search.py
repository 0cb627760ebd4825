"""The command ``lightning-dp search``: what choosing settings by several private runs costs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lightning_dp.accounting import EpsilonBound, Phase, epsilon_bound, search_epsilon
from lightning_dp.accounting.risk import round_up
from lightning_dp.accounting.search import RandomNumber
from lightning_dp.plan.privacy_plan import check_delta
from lightning_dp.record.written import records_in

_ONE_RUN = ("noise_multiplier", "sampling_probability", "steps", "runs")


def run(words: Sequence[str]) -> None:
    """Run ``lightning-dp search``.

    Args:
        words: the command line after ``search``.

    Raises:
        SystemExit: the command line, a number or a file is wrong; the message says which.
    """
    parser = _parser()
    args = parser.parse_args(words)
    given = [name for name in _ONE_RUN if getattr(args, name) is not None]
    try:
        check_delta(args.delta)
        if args.statements:
            if given or args.random:
                parser.error(
                    "files and --runs, --random, --noise-multiplier, --sampling-probability or --steps: expected one or the "
                    "other. Files are runs that were made, all of which are composed."
                )
            phases = [phase_of(file) for path in args.statements for file in _files(Path(path))]
            bound, what = epsilon_bound(phases, args.delta), f"{len(phases)} runs, all of which may be released"
        else:
            missing = [name for name in _ONE_RUN if name not in given]
            if missing:
                parser.error(f"expected --{missing[0].replace('_', '-')}, or files privacy.json of the runs made.")
            one = [Phase(args.noise_multiplier, args.sampling_probability, args.steps)]
            bound = search_epsilon(one, args.delta, args.runs, args.random)
            what = (
                f"{args.runs:g} runs, all of which may be released"
                if args.random is None
                else f"the best run of a {args.random} number with mean {args.runs:g}, and nothing else"
            )
    except ValueError as error:
        parser.error(str(error))
    _say(bound, args, what)


def _files(path: Path) -> list[Path]:
    """The statements of all runs in a folder, or the file that was given."""
    return (records_in(path) or [path / "privacy.json"]) if path.is_dir() else [path]


def phase_of(file: Path) -> Phase:
    """What the run behind a ``privacy.json`` has spent.

    Raises:
        ValueError: there is no such file, it is no statement, or σ and q alone do not describe the run.
    """
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
        return phase_in(found)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: expected the privacy.json of a finished run ({type(error).__name__}: {error}). Give the file, or the "
            "folder it is in."
        ) from error
    except _OtherRunError as error:
        raise ValueError(f"{file}: {error}") from None


def phase_in(found: Any) -> Phase:
    """The same of what such a file holds.

    Raises:
        ValueError: σ and q alone do not describe the run.
    """
    phase = Phase(found["noise_multiplier"], found["sampling_probability"], found["steps"])
    if any(caveat.startswith("composed of") for caveat in found["caveats"]) or found["sampling"] != "Poisson":
        raise _OtherRunError(
            "expected a run with one σ and one q and plain Poisson sampling, since the file does not hold the rest. "
            "Compose it by hand with lightning_dp.accounting.epsilon_bound."
        )
    return phase


class _OtherRunError(ValueError):
    """A run that σ and q do not describe."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-dp search",
        description="Print an upper bound on ε of choosing settings by several DP-SGD runs (add/remove one example).",
    )
    parser.add_argument("statements", nargs="*", metavar="PRIVACY.JSON", help="runs that were made; composes them")
    parser.add_argument("--runs", type=float, metavar="K", help="number of runs; with --random their mean")
    parser.add_argument(
        "--random",
        choices=get_args(RandomNumber),
        help="the number of runs is drawn at random and kept secret, and only the best run is released",
    )
    parser.add_argument("--noise-multiplier", type=float, metavar="S", help="σ of each run")
    parser.add_argument("--sampling-probability", type=float, metavar="Q", help="q of each run")
    parser.add_argument("--steps", type=int, metavar="T", help="private steps of each run")
    parser.add_argument("--delta", type=float, required=True, metavar="D", help="δ of the whole search")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    return parser


def _say(bound: EpsilonBound, args: argparse.Namespace, what: str) -> None:
    if args.json:
        epsilon: float | str = "inf" if math.isinf(bound.epsilon) else bound.epsilon
        found = {"epsilon": epsilon, "delta": args.delta, "accountant": bound.accountant, "released": what}
        print(json.dumps(found, ensure_ascii=False))
        return
    print(f"ε ≤ {round_up(bound.epsilon)} at δ = {args.delta:g} for the search: {what} ({bound.accountant} accountant)")
