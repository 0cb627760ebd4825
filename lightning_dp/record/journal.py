"""privacy.journal: what every fit has charged, on disk before it is released, so that a resume can count what is lost.

A checkpoint holds the ledger as it was when the checkpoint was written. If the process dies later, the steps in between
are in no checkpoint, but what was computed from them may have left the process: logged validation metrics, a checkpoint
that was copied and deleted. So each fit keeps one line in a file beside ``privacy.json``, in the Trainer's own folder; a
resume finds that line and charges what the checkpoint does not hold. Every number in the file is public.
"""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dp.record.journal_line import FILE_NAME, STEPS_AT, FitLine, JournalError, read_lines
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.plain_file import open_plain

try:
    import fcntl
except (
    ImportError
):  # pragma: no cover (Windows: two fits that start in one folder at once may not see each other's line)
    fcntl = None  # type: ignore[assignment]  # a module, or nothing

__all__ = ["FILE_NAME", "Journal", "JournalError"]


class Journal:
    """The line of one fit.

    Args:
        folder: the Trainer's own, where the journal is or will be, or ``None`` to keep none (``fast_dev_run``).
        phase: the public numbers of this fit's steps, as the ledger writes them.
        before: the lineage of the checkpoint that is resumed, if any.
        facts: of a first fit, see :mod:`lightning_dp.record.course`.

    Raises:
        JournalError: the file cannot be written, or what is in its place is no journal.

    Example:
        >>> import tempfile
        >>> from lightning_dp.record.lost_steps import Places, count_lost
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     journal = Journal(Path(folder), {"noise_multiplier": 1.0})
        ...     checkpoint = journal.lineage
        ...     journal.record(3)
        ...     journal.close(ended=False)
        ...     phases, _ = count_lost(checkpoint, Places([Path(folder)]))
        >>> phases
        [{'noise_multiplier': 1.0, 'steps': 3}]
    """

    def __init__(
        self, folder: Path | None, phase: Mapping[str, Any], before: Lineage | None = None, facts: str = ""
    ) -> None:
        self.name = secrets.token_hex(8)
        self._file = None if folder is None else folder.absolute() / FILE_NAME
        self._before = before or Lineage(self.name, str(self._file or ""), facts=facts)
        origin = None
        if before is not None:
            origin = {
                "fit": before.last,
                "steps": before.counted.get(before.last, 0),
                "head": before.heads.get(before.last, ""),
            }
        self._line = FitLine(self.name, self._before.training, dict(phase), origin=origin)
        self._descriptor: int | None = None
        if self._file is not None:
            with _told(self._file):
                self._file.parent.mkdir(parents=True, exist_ok=True)
                self._line, self._offset = _append(self._file, self._line)
                self._descriptor = open_plain(self._file, os.O_RDWR)
        self._head = self._line.head

    def __getstate__(self) -> dict[str, Any]:
        """A copy knows what is counted and writes nothing: the open file stays with the original."""
        return {**self.__dict__, "_descriptor": None}

    @property
    def lineage(self) -> Lineage:
        """What a checkpoint written now has to know."""
        return replace(
            self._before,
            file=str(self._file or self._before.file),
            counted={**self._before.counted, self.name: self._line.steps},
            heads={**self._before.heads, self.name: self._head},
            last=self.name,
        )

    def record(self, steps: int) -> None:
        """Write that ``steps`` steps of this fit are charged. Call it before the step is released.

        The number reaches the operating system, so it survives the end of the process. It is not forced to the disk at
        each step: a machine that loses its power may forget the last seconds.

        Raises:
            JournalError: it cannot be written.
        """
        self._line = replace(self._line, steps=steps)
        if self._descriptor is not None and self._file is not None:
            with _told(self._file):
                self._write()

    def close(self, *, ended: bool = False) -> None:
        """Write nothing more.

        Args:
            ended: whether the fit took all the steps it had planned.
        """
        if self._descriptor is None:
            return
        self._line = replace(self._line, state="ended" if ended else "open", closed=True)
        with suppress(OSError):  # then it counts as killed, which is the safe way round
            self._write()
        os.close(self._descriptor)
        self._descriptor = None

    def _write(self) -> None:
        assert self._descriptor is not None
        os.pwrite(self._descriptor, self._line.changing(self._head).encode(), self._offset + STEPS_AT)


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


def _append(file: Path, line: FitLine) -> tuple[FitLine, int]:
    """Add a line in one write, after what is there, and say where it begins."""
    descriptor = open_plain(file, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # until the descriptor is closed
        line = replace(line, after=read_lines(file).head)
        size = os.fstat(descriptor).st_size
        torn = "\n" if size > 0 and os.pread(descriptor, 1, size - 1) != b"\n" else ""
        content = (torn + line.text()).encode()
        if os.write(descriptor, content) < len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
        return line, os.lseek(descriptor, 0, os.SEEK_CUR) - len(line.text().encode())
    finally:
        os.close(descriptor)
