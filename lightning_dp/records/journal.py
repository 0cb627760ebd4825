"""privacy.journal: what every fit has charged, on disk before it is released, so that a resume can count what is lost.

A checkpoint holds the ledger as it was when the checkpoint was written. If the process dies later, the steps in between
are in no checkpoint, but what was computed from them may have left the process: logged validation metrics, a checkpoint
that was copied and deleted. So each fit keeps one line in a file beside ``privacy.json``; a resume finds that line and
charges what the checkpoint does not hold. Every number in the file is public.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

FILE_NAME = "privacy.journal"
_OPEN, _ENDED = "open", "ended"
_STEPS_AT, _STATE_AT = 10, 41
_REMEDY = "Restore the file as training left it; spent budget cannot be guessed."


class JournalError(ValueError):
    """The journal cannot be read or written, so steps could go uncounted. The message names the file and the remedy."""


@dataclass(frozen=True)
class Lineage:
    """What a checkpoint knows about the fits that led to it.

    Args:
        training: name of the training, shared by a first fit and all that resume it.
        file: where the fits keep their lines.
        counted: name of a fit → how many of its steps the checkpoint's ledger holds.
        lost: how many of the ledger's steps are in no weights, because a fit was interrupted after its last checkpoint.
        found: whether the journal was there at every resume.
    """

    training: str
    file: str
    counted: dict[str, int] = field(default_factory=dict)
    lost: int = 0
    found: bool = True

    @classmethod
    def read(cls, raw: object) -> Lineage:
        """The inverse of ``asdict``.

        Raises:
            ValueError: a part is missing or of another type.
        """
        kinds = {"training": str, "file": str, "counted": dict, "lost": int, "found": bool}
        if not isinstance(raw, Mapping) or {name: type(value) for name, value in raw.items()} != kinds:
            raise ValueError(f"journal={raw!r} in the checkpoint: expected {sorted(kinds)}. Resume from a whole one.")
        counted: dict[str, int] = raw["counted"]
        if any(type(name) is not str or type(steps) is not int or steps < 0 for name, steps in counted.items()):
            raise ValueError(f"counted={counted!r} in the checkpoint: expected step counts. Resume from a whole one.")
        return cls(**raw)

    @property
    def notes(self) -> tuple[str, ...]:
        """Caveats for the statement."""
        notes = []
        if self.lost:
            notes.append(
                f"training was interrupted: {self.lost} of the steps are in no checkpoint that was resumed from and are "
                "counted, since what was logged of them may have been seen"
            )
        if not self.found:
            notes.append(
                f"{FILE_NAME} of an earlier fit was not found: if that fit was interrupted, its steps after the checkpoint "
                "are not counted"
            )
        return tuple(notes)


def count_lost(lineage: Lineage, near: Path | None) -> tuple[list[dict[str, Any]], Lineage]:
    """The steps that interrupted fits of this training took and the checkpoint does not hold.

    A fit is interrupted unless it took all the steps it had planned; one that did has a ``privacy.json`` of its own, and
    going back behind its end makes a second continuation, which is a release of its own.

    Args:
        lineage: of the checkpoint.
        near: the checkpoint's path; if the folder has moved since, the journal is found beside or above it.

    Returns:
        Phases for the ledger, and the lineage in which they are counted.

    Raises:
        JournalError: a line of this training's journal was edited or damaged.
    """
    beside = [] if near is None else [near.parent / FILE_NAME, near.parent.parent / FILE_NAME]
    files = [file for file in dict.fromkeys([Path(lineage.file), *beside]) if file.is_file()]
    counted, phases = dict(lineage.counted), []
    for line in (line for file in files for line in _lines(file)):
        missing = line["steps"] - counted.get(line["fit"], 0)
        if line["training"] == lineage.training and line["state"] == _OPEN and missing > 0:
            phases.append({**line["phase"], "steps": missing})
            counted[line["fit"]] = line["steps"]
    lost = lineage.lost + sum(phase["steps"] for phase in phases)
    file = str(files[0]) if files else lineage.file
    return phases, replace(lineage, counted=counted, lost=lost, file=file, found=lineage.found and bool(files))


class Journal:
    """The line of one fit.

    Args:
        folder: where a new journal goes, or ``None`` to keep none (``fast_dev_run``).
        phase: the public numbers of this fit's steps, as the ledger writes them.
        past: the lineage of the checkpoint that is resumed, if any: its journal is continued while it can be found.

    Raises:
        JournalError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder), {"noise_multiplier": 1.0})
        ...     journal.record(3)
        ...     journal.close(ended=False)
        ...     phases, _ = count_lost(Lineage(journal.lineage.training, journal.lineage.file), None)
        >>> phases
        [{'noise_multiplier': 1.0, 'steps': 3}]
    """

    def __init__(self, folder: Path | None, phase: Mapping[str, Any], past: Lineage | None = None) -> None:
        self.name = secrets.token_hex(8)
        here = None if folder is None else folder.absolute() / FILE_NAME
        known = None if past is None or not Path(past.file).is_file() else Path(past.file)
        self._file = None if here is None else known or here
        self._past = past or Lineage(self.name, str(self._file or ""))
        self._steps = 0
        self._descriptor: int | None = None
        if self._file is not None:
            head = f'{{"steps": {0:<20d}, "state": {json.dumps(_OPEN):<7}, "fit": "{self.name}", '
            rest = json.dumps({"training": self._past.training, "phase": dict(phase)})
            with _told(self._file):
                self._offset = _append(self._file, head + rest.removeprefix("{") + "\n")
                self._descriptor = os.open(self._file, os.O_RDWR)

    @property
    def lineage(self) -> Lineage:
        """What a checkpoint written now has to know."""
        file = str(self._file or self._past.file)
        return replace(self._past, file=file, counted={**self._past.counted, self.name: self._steps})

    def record(self, steps: int) -> None:
        """Write that ``steps`` steps of this fit are charged. Call it before the step is released.

        The number reaches the operating system, so it survives the end of the process. It is not forced to the disk at
        each step: a machine that loses its power may forget the last seconds.

        Raises:
            JournalError: it cannot be written.
        """
        self._steps = steps
        if self._descriptor is not None and self._file is not None:
            with _told(self._file):
                os.pwrite(self._descriptor, f"{steps:<20d}".encode(), self._offset + _STEPS_AT)

    def close(self, *, ended: bool) -> None:
        """Write nothing more.

        Args:
            ended: whether the fit took all the steps it had planned; its steps are then not those of an interrupted fit.
        """
        if self._descriptor is None:
            return
        if ended:
            with suppress(OSError):  # then it counts as interrupted, which is the safe way round
                os.pwrite(self._descriptor, f"{json.dumps(_ENDED):<7}".encode(), self._offset + _STATE_AT)
        os.close(self._descriptor)
        self._descriptor = None


class _told:  # noqa: N801 (read as a word in a with statement)
    """Turns an OSError into one that says what the file is for."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise JournalError(
                f"{self._file} cannot be written ({error}): expected a folder with room that may be written to, since every "
                "step is written down before it is released. Make room, or give Trainer(default_root_dir=...)."
            ) from error


def _append(file: Path, line: str) -> int:
    """Add a line in one write, and say where it begins."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        content = (("\n" if torn else "") + line).encode()
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return file.read_bytes().rindex(line.encode())


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The fits in a journal. A line without an end is of a fit that had not begun when the disk was full."""
    for number, text in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if not text.endswith("}"):
            continue
        try:
            line = json.loads(text)
            kinds = {name: type(line[name]) for name in ("steps", "state", "fit", "training", "phase")}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise JournalError(f"{file}, line {number}: expected the line of a fit. {_REMEDY}") from error
        right = kinds == {"steps": int, "state": str, "fit": str, "training": str, "phase": dict}
        if not right or line["steps"] < 0 or line["state"] not in (_OPEN, _ENDED):
            raise JournalError(f"{file}, line {number}: {text[:200]!r}: expected the line of a fit. {_REMEDY}")
        yield line
