"""The folder of a run, on this machine or behind an address such as ``s3://bucket/run``."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem

from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import is_local
from lightning_dp.record.whole_file import create_whole, write_whole

LONGEST = 2**20
"""Bytes of the longest file that is read: a statement has some two thousand."""


def journal_folder(address: str | Path) -> Path:
    """Where the journal of a run in ``address`` is: there, or in the working directory if that is on no disk of this machine.

    A journal is written in place at every step, which no store behind an address can do. The record, which is written seldom,
    is kept there.

    Raises:
        PreflightError: nothing that is installed can write to ``address``.
    """
    return RunFolder(address).path or Path.cwd()


class RunFolder:
    """Small text files in one folder, each there whole or not at all.

    Args:
        address: a path, or whatever else the Trainer takes as a folder; then it is reached through fsspec, as Lightning does.

    Raises:
        PreflightError: nothing that is installed can write there.

    Example:
        >>> folder = RunFolder("memory://runs/one")
        >>> folder.create("note", "first"), folder.create("note", "second"), folder.read("note")
        (True, False, 'first')
    """

    def __init__(self, address: str | Path) -> None:
        try:
            self._system: Any = get_filesystem(str(address))
        except (ImportError, ValueError) as error:
            raise PreflightError(
                f"default_root_dir={str(address)!r}: expected a folder that can be written to ({error}). Install the package "
                "that is named, or give Trainer(default_root_dir=...) or the logger's save_dir another folder."
            ) from error
        local = is_local(str(address))
        self.path = Path(self._system._strip_protocol(str(address))) if local else None
        """Where the folder is on this machine, or ``None``."""
        self._address = str(address).rstrip("/")

    def place(self, name: str) -> str:
        """A file of the folder, for messages."""
        return str(self.path / name) if self.path is not None else f"{self._address}/{name}"

    def read(self, name: str) -> str | None:
        """The content of a file; ``None`` if there is none.

        Raises:
            OSError: it cannot be read, is no plain file, or is far longer than what this package writes.
            UnicodeDecodeError: it is no text.
        """
        if self.path is None:
            found: str | None = self._far(lambda: self._read_far(name))
            return found
        file = self.path / name
        try:
            descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a pipe would wait for a writer
        except FileNotFoundError:
            return None if not file.is_symlink() else ""  # a link to nothing takes the name all the same
        with os.fdopen(descriptor, "rb") as opened:
            what = os.fstat(descriptor)
            if not stat.S_ISREG(what.st_mode) or what.st_size > LONGEST:
                raise OSError(f"{file} is no statement")
            return opened.read().decode("utf-8")

    def write(self, name: str, text: str) -> None:
        """Replace a file.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        if self.path is not None:
            write_whole(self.path / name, text)
        else:
            self._far(lambda: self._write_far(name, text))

    def create(self, name: str, text: str) -> bool:
        """Write a file that was not there before; ``False``, and nothing done, if it was.

        Raises:
            OSError: it could not be written.
        """
        if self.path is not None:
            return create_whole(self.path / name, text)
        if self.read(name) is not None:
            return False
        self.write(name, text)
        return True

    def remove(self, name: str) -> None:
        """Remove a file, if it is there.

        Raises:
            OSError: it is there still.
        """
        if self.path is not None:
            (self.path / name).unlink(missing_ok=True)
        else:
            with suppress(FileNotFoundError):
                self._far(lambda: self._system.rm_file(self.place(name)))

    def _read_far(self, name: str) -> str | None:
        if not self._system.exists(self.place(name)):
            return None
        with self._system.open(self.place(name), "rb") as opened:
            content: bytes = opened.read(LONGEST + 1)
        if len(content) > LONGEST:
            raise OSError(f"{self.place(name)} is no statement")
        return content.decode("utf-8")

    def _write_far(self, name: str, text: str) -> None:
        self._system.makedirs(self._address, exist_ok=True)
        with self._system.transaction, self._system.open(self.place(name), "wb") as opened:
            opened.write(text.encode("utf-8"))

    def _far(self, act: Any) -> Any:
        """File systems behind an address tell of trouble by errors of their own."""
        try:
            return act()
        except (OSError, UnicodeDecodeError, MemoryError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {error}") from error
