"""A small text file is there whole or not at all, whenever the process or the machine stops."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
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
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
