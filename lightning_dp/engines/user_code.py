"""Where in the user's own program something happened, for messages."""

from __future__ import annotations

import sys
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from torch import nn

from lightning_dp.errors import PreflightError

_PACKAGE = Path(__file__).parents[1]
_ORDINARY = tuple(f"{_PACKAGE / part}/" for part in ("models", "data"))
_OURS_AND_THEIRS = ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics")
_PACKAGES = tuple({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
_STANDARD = sysconfig.get_path("stdlib")


@dataclass(frozen=True)
class Line:
    """A line of somebody's program.

    Attributes:
        file: the path of its file.
        number: counted from 1.
        function: the function it is in.
    """

    file: str
    number: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.number} in {self.function}"


def line_of_the_caller() -> Line | None:
    """The line of the user's own that is being run, if any; see :func:`line_of_error` for which."""
    return _line(list(_outwards(sys._getframe(1))))


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn, at the line of the user's own that is being run; at the caller's if there is none."""
    frames = [frame for frame, _ in _outwards(sys._getframe(1)) if not _is_skipped(frame.f_code.co_filename)]
    for is_users in (_is_nobodys_package, _is_another_package):
        for level, frame in enumerate(frames, start=2):
            if is_users(frame.f_code.co_filename):
                warnings.warn(message, category, stacklevel=level)
                return
    warnings.warn(message, category, stacklevel=2)


def line_of_error(error: BaseException) -> Line | None:
    """The line of the user's own in which ``error`` was raised, if any.

    That is the innermost one of no installed package; failing that, the innermost one outside torch, Lightning and this
    package, as for a module that is itself installed.
    """
    return _line([(frame, number) for frame, number in reversed(list(_of_error(error)))])


def library_that_calls() -> str | None:
    """The package that stands between the user's program and Lightning in the call under way, ``None`` if none does."""
    for frame, _ in _outwards(sys._getframe(1)):
        file = frame.f_code.co_filename
        if _is_another_package(file):
            root = next(root for root in _PACKAGES if file.startswith(root))
            return Path(file).relative_to(root).parts[0].removesuffix(".py")
        if _is_nobodys_package(file):
            return None
    return None


@contextmanager
def no_end_of_the_data(what: str) -> Iterator[None]:
    """Refuse ``StopIteration`` from code of the user's: a loop of Lightning or torch takes it for the end of the data.

    Args:
        what: whose code runs, for the message.

    Raises:
        PreflightError: it was raised, with the line.
    """
    try:
        yield
    except StopIteration as error:
        line = line_of_error(error)
        raise PreflightError(
            f"{what} raised StopIteration{'' if line is None else f' ({line})'}: expected it to return. A run that ends, or an "
            "epoch that is cut short, when an example is seen tells that it is there. Leave broken examples out of the dataset "
            "before training; give a loss of zero where there is nothing to learn; end training by max_steps, or by a "
            "validation metric."
        ) from error


def layer_of_error(error: BaseException) -> nn.Module | None:
    """The innermost ``torch.nn.Module`` in whose method ``error`` was raised, or ``None``."""
    for frame, _ in reversed(list(_of_error(error))):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return owner
    return None


def is_users(file: str | None) -> bool:
    """Whether a file is the user's own, or of a library that is neither torch's nor Lightning's nor this package."""
    return file is not None and (_is_nobodys_package(file) or _is_another_package(file))


def _of_error(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next


def _outwards(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def _line(innermost_first: list[tuple[FrameType, int]]) -> Line | None:
    for is_users in (_is_nobodys_package, _is_another_package):
        for frame, number in innermost_first:
            if is_users(frame.f_code.co_filename):
                return Line(frame.f_code.co_filename, number, frame.f_code.co_name)
    return None


def is_file_of_the_users(file: str) -> bool:
    """Whether a file is of no installed package."""
    return bool(file) and _is_nobodys_package(file)


def _is_nobodys_package(file: str) -> bool:
    library = _is_machinery(file) or file.startswith((*_PACKAGES, _STANDARD, "<frozen")) or "site-packages" in file
    return not library and file != "<string>"


def _is_another_package(file: str) -> bool:
    known = tuple(f"{root}/{name}/" for root in _PACKAGES for name in _OURS_AND_THEIRS)
    return file.startswith(_PACKAGES) and not (_is_machinery(file) or file.startswith(known))


def is_of_this_package(file: str) -> bool:
    """Whether ``file`` is of this package, its ordinary models and data left out."""
    return _is_machinery(file)


def is_of_torch(file: str) -> bool:
    """Whether ``file`` is of torch."""
    return file.startswith(tuple(f"{root}/torch/" for root in _PACKAGES))


def _is_skipped(file: str) -> bool:
    """Whether ``warnings.warn`` leaves out frames of ``file`` when it counts."""
    return "importlib" in file and "_bootstrap" in file


def _is_machinery(file: str) -> bool:
    """Whether ``file`` is of this package, its ordinary models and data left out."""
    return file.startswith(f"{_PACKAGE}/") and not file.startswith(_ORDINARY)
