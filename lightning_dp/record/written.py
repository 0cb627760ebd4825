"""What runs have written, read back: their records, and of each the lines of its fits in journals. Needs no torch."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_dp.accounting.risk import finite
from lightning_dp.record.journal_line import FILE_NAME as JOURNAL
from lightning_dp.record.journal_line import FitLine, JournalError, read_lines
from lightning_dp.record.plain_file import read_plain

FILE_NAME = "privacy.json"
_NUMBERED = re.compile(r"privacy-([2-9]|[1-9][0-9]+)\.json")
_MOST_BYTES, _MOST_RUNS = 2**22, 1000
_STATES = ("running", "interrupted", "ended")


def name_of(number: int) -> str:
    """``privacy.json`` for the first run of a folder, ``privacy-2.json`` for the second, and so on."""
    return FILE_NAME if number == 1 else f"privacy-{number}.json"


def records_in(folder: Path) -> list[Path]:
    """The records of all runs in a folder, the first one's first."""
    later = [
        (int(found[1]), path) for path in folder.glob("privacy-*.json") if (found := _NUMBERED.fullmatch(path.name))
    ]
    first = folder / FILE_NAME
    return [*([first] if first.exists() else []), *(path for _, path in sorted(later))]


def digest_of(value: Any) -> str:
    """Of plain values, with ∞ as such or as in JSON; the same in every process.

    Example:
        >>> digest_of({"steps": 3, "clip_norm": float("inf")}) == digest_of({"clip_norm": "inf", "steps": 3})
        True
    """
    return hashlib.blake2b(json.dumps(finite(value), sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Written:
    """A record.

    Args:
        file: where it is.
        content: the whole of it.
        state: ``"running"``, ``"interrupted"`` or ``"ended"``.
        steps: how many steps it counts.
        fits: name of each fit → how many of its steps are counted; ``None`` in a file of an early version.
        phases: what was charged, as the ledger has it; ``None`` where the file does not hold it.
        plan: the numbers of the plan in force; ``None`` likewise.
    """

    file: Path
    content: Mapping[str, Any]
    state: str
    steps: int
    fits: Mapping[str, int] | None
    phases: Sequence[Mapping[str, Any]] | None
    plan: Mapping[str, Any] | None

    @classmethod
    def read(cls, file: Path) -> Written:
        """A record, of this version or an earlier one.

        Raises:
            ValueError: there is none, or it is none.
        """
        try:
            raw = read_plain(file.resolve(), _MOST_BYTES)
            if raw is None:
                raise FileNotFoundError("there is none")
            found = json.loads(raw.decode("utf-8"))
            state, steps, fits = found.get("state", "ended"), found["steps"], found.get("fits")
            ledger, plan = found.get("ledger"), found.get("plan")
            phases = None if ledger is None else [infinite(phase) for phase in ledger["phases"]]
            plan = None if plan is None else infinite(plan)
            if state not in _STATES or type(steps) is not int or steps < 0:
                raise ValueError(f"state={state!r}, steps={steps!r}")
            if fits is not None and not all(type(count) is int and count >= 0 for count in fits.values()):
                raise ValueError(f"fits={fits!r}")
            for name in ("epsilon", "delta"):
                if math.isnan(float(found[name])):
                    raise ValueError(f"{name}={found[name]!r}")
            for name, kind in (("caveats", list), ("run", dict), ("risk", dict)):
                if not isinstance(found.get(name), kind | None):
                    raise ValueError(f"{name}={found[name]!r}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"{file}: expected the privacy.json of a run ({type(error).__name__}: {str(error)[:200]}). Give the file, or "
                "the folder it is in."
            ) from error
        return cls(file, found, state, steps, fits, phases, plan)


@dataclass(frozen=True)
class Charged:
    """What journals say of the fits of a record.

    Args:
        lines: of its fits, in the order in which they were.
        others: of further fits of the same training.
        whole: whether no journal among them was cut.
    """

    lines: Sequence[FitLine]
    others: Sequence[FitLine] = ()
    whole: bool = True


def charged_of(record: Written, journals: Sequence[Path] = ()) -> Charged:
    """What journals say of a record's fits: those given, or those beside it, above it, and in the folders beside its own.

    Raises:
        ValueError: a fit is in none of them, or a journal is damaged.
    """
    found = list(_journals(record.file, journals))
    lines = furthest(line for read, _ in found for line in read)
    fits = record.fits
    if fits is None:  # an early version did not say: all of the nearest journal, if that is of one training
        nearest = next((read for read, _ in found if read), [])
        fits = {} if len({line.training for line in nearest}) > 1 else {line.fit: line.steps for line in nearest}
    missing = [name for name in fits if name not in lines]
    if missing or not fits:
        listed = f"the line of {', '.join(missing)}" if missing else "one training's lines and no other's"
        raise ValueError(
            f"{record.file}: expected {listed} in a {JOURNAL} beside the file, above it or in a folder beside its own. Give "
            "it with --journal, or take the file's word for its steps with --without-journal."
        )
    training = {lines[name].training for name in fits}
    others = [line for name, line in lines.items() if name not in fits and line.training in training and line.steps]
    whole = all(whole for read, whole in found if any(line.training in training for line in read))
    return Charged([lines[name] for name in fits], others, whole)


def furthest(lines: Iterable[FitLine]) -> dict[str, FitLine]:
    """Each fit once: of copies of its line the one that went furthest."""
    found: dict[str, FitLine] = {}
    for line in lines:
        other = found.get(line.fit)
        if other is None or (line.steps, line.closed) > (other.steps, other.closed):
            found[line.fit] = line
    return found


def infinite(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`~lightning_dp.accounting.risk.finite`, of numbers by name."""
    return {name: math.inf if value == "inf" else value for name, value in numbers.items()}


def _journals(file: Path, given: Sequence[Path]) -> Iterator[tuple[Sequence[FitLine], bool]]:
    if given:
        for one in given:
            place = one / JOURNAL if one.is_dir() else one
            if not place.is_file():
                raise ValueError(f"--journal {one}: expected the {JOURNAL} of a run, or the folder it is in.")
            read = read_lines(place)
            yield read.lines, read.whole
        return
    folder = file.resolve().parent
    for above in (folder, *folder.parents):
        read = read_lines(above / JOURNAL)
        yield read.lines, read.whole
    beside: list[Path] = []
    with suppress(OSError):
        beside = sorted(one for one in folder.parent.iterdir() if one.is_dir() and one != folder)[:_MOST_RUNS]
    for one in beside:
        with suppress(JournalError):  # of some other run, most likely
            read = read_lines(one / JOURNAL)
            yield read.lines, read.whole
