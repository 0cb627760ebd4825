"""Small files of a run, opened so that whatever lies in their place can neither hang the process nor be written through."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def open_plain(file: Path, flags: int) -> int:
    """A descriptor of ``file``, which is a plain file: no link, device, pipe or folder.

    Args:
        file: its folder may be reached through links, the file itself may not be one.
        flags: of ``os.open``.

    Raises:
        OSError: it is something else, or cannot be opened.
    """
    descriptor = os.open(file, flags | _CAREFUL, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no plain file")
    return descriptor


def read_plain(file: Path, most: int) -> bytes | None:
    """The content of a plain file of at most ``most`` bytes, or ``None`` if there is no such file.

    Raises:
        OSError: it is no plain file, larger, or cannot be read.
    """
    try:
        descriptor = open_plain(file, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    with os.fdopen(descriptor, "rb") as opened:
        if os.fstat(descriptor).st_size > most:
            raise OSError(errno.EFBIG, f"it is larger than {most} bytes")
        return opened.read(most)
