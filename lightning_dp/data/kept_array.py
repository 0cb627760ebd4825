"""A large array that is computed piece by piece into a file: once, by one process, going on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dp.data.images import DataError

try:
    import fcntl
except (
    ImportError
):  # pragma: no cover  # not on Windows: two processes may then compute the same, each into its own file
    fcntl = None  # type: ignore[assignment]  # a module, or nothing

Array = npt.NDArray[Any]


def keep_array(
    path: Path,
    shape: tuple[int, ...],
    dtype: type,
    pieces: Callable[[int], Iterator[Array]],
    belong: Callable[[Array], bool],
) -> None:
    """Put an array into ``path`` in NumPy's format, unless it is there.

    Rows are written to ``<path>.part``, which is renamed when it is whole. Where that is left behind by a process that was
    stopped, the rows that it holds stay, and ``pieces`` is asked for the others. Numbers must be finite: a row that is not
    there yet begins with NaN. A second process waits for the first and finds its file.

    Args:
        path: of the file.
        shape: of the array; the first axis counts rows.
        dtype: NumPy's float16 or float32.
        pieces: gives the rows from the given one to the last, some at a time.
        belong: whether rows that were left behind, the first ones, are of the same array.

    Raises:
        DataError: as ``pieces`` raises it. Nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part" if fcntl is not None else f"{path.name}.{os.getpid()}.part")
    with _alone(part):
        if path.is_file():
            part.unlink()
            return
        try:
            array, start = _opened(part, shape, dtype)
            if start and not belong(array[:start]):
                part.write_bytes(b"")
                array, start = _opened(part, shape, dtype)
            if start:
                rank_zero_info(f"lightning_dp: {start} of {len(array)} rows are in {part} and are not computed again.")
            for piece in pieces(start):
                array[start : start + len(piece)] = piece
                start += len(piece)
            array.flush()
        except DataError:
            part.unlink()
            raise
        part.replace(path)


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Holds the lock of a file that nobody else has renamed in the meantime."""
    with part.open("ab") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                rank_zero_info(f"lightning_dp: another process writes {part}; waiting for it.")
                fcntl.flock(file, fcntl.LOCK_EX)
        part.touch()  # the one before has renamed it
        yield


def _opened(part: Path, shape: tuple[int, ...], dtype: type) -> tuple[np.memmap[Any, Any], int]:
    """The array on disk and its first row that is not there yet."""
    if part.stat().st_size:
        try:
            array = np.lib.format.open_memmap(part, mode="r+")
        except ValueError:  # no array, or cut short
            pass
        else:
            if (array.shape, array.dtype) == (shape, np.dtype(dtype)):
                missing = np.flatnonzero(np.isnan(array.reshape(len(array), -1)[:, 0]))
                done = int(missing[0]) if len(missing) else len(array)
                return array, max(done - 1, 0)  # the last row may have been begun and not ended
    array = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
    array.reshape(len(array), -1)[:, 0] = np.nan
    array.flush()
    return array, 0
