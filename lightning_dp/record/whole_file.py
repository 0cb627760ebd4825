"""A small text file is there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``: written beside it, forced to the disk, and then renamed in one step.

    A reader finds the old content or the new one and never a part, and a disk that is full leaves the old one.

    Args:
        path: the file; its folder is made if there is none.
        text: its content.

    Raises:
        OSError: the file could not be written; ``path`` is as it was.
    """
    with _beside(path, text) as name:
        os.replace(name, path)


def create_whole(path: Path, text: str) -> bool:
    """Like :func:`write_whole`, but never in the place of a file: of several processes one makes it.

    Returns:
        Whether ``path`` was made; ``False`` if there was one already, which is left as it is.

    Raises:
        OSError: the file could not be written.
    """
    with _beside(path, text) as name:
        try:
            os.link(name, path)
        except FileExistsError:
            return False
        except OSError:  # no links on this file system
            try:
                os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
            except FileExistsError:
                return False
            os.replace(name, path)
    return True


@contextmanager
def _beside(path: Path, text: str) -> Iterator[str]:
    """A file with ``text`` on the disk beside ``path``, gone at the end unless it was renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        yield name
    finally:
        with suppress(OSError):
            os.unlink(name)
