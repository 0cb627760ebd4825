"""One line of privacy.journal: what a fit is, which lines were before it, and how many of its steps are charged.

The fixed part has a digest, the *head*, into which the head of the line before enters: so whoever knows the head of a line
knows all fixed parts up to it, and a checkpoint keeps the heads of its fits. The part that changes is written at every step,
in place, by one ``pwrite``: the count twice, each with a digest, so that a write that was torn leaves one that is whole.
The digests notice damage, edits and mix-ups. They are no signature: whoever can write the file can also compute them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lightning_dp.plan.privacy_plan import MOST_STEPS
from lightning_dp.record.plain_file import read_plain

FILE_NAME = "privacy.journal"
STEPS_AT = len('{"steps": ')
State = Literal["open", "ended"]
_MOST_BYTES, _MOST_LINES = 2**26, 100_000
_REMEDY = (
    "Restore the file as training left it. If that is lost, move the file away: the statement then says what was not "
    "counted."
)


class JournalError(ValueError):
    """The journal cannot be read or written, so steps could go uncounted. The message names the file and the remedy."""


@dataclass(frozen=True)
class FitLine:
    """One fit.

    Args:
        fit: its name.
        training: name of the training that it belongs to, that of its first fit.
        phase: the public numbers of its steps, as the ledger writes them.
        after: head of the line before it in the file, or empty.
        origin: the fit whose checkpoint it continues: name, how many steps of it are counted, and its head; or ``None``.
        steps: how many are charged.
        state: ``"ended"`` if the fit took all the steps it had planned.
        closed: whether the fit ended in a way that let it say so: only then is ``steps`` surely its last word.
        has_digest: whether digests could be checked; the first version wrote none.
    """

    fit: str
    training: str
    phase: Mapping[str, Any]
    after: str = ""
    origin: Mapping[str, Any] | None = None
    steps: int = 0
    state: State = "open"
    closed: bool = False
    has_digest: bool = True

    @property
    def head(self) -> str:
        """Digest of what the line is from its first moment on."""
        fixed = [self.fit, self.training, dict(self.phase), self.after, self.origin]
        return hashlib.blake2b(json.dumps(fixed, sort_keys=True).encode(), digest_size=16).hexdigest()

    def changing(self, head: str) -> str:
        """The part of the text from the number of steps on that is written anew at every step.

        Args:
            head: :attr:`head`, which is the same at every step.
        """
        steps, state, closed = f"{self.steps:<20d}", f"{json.dumps(self.state):<7}", int(self.closed)
        digest = _digest(head, self.steps, self.state, closed)
        copy = f'[{steps}, {state}, {closed}, "{digest}"]'
        return f'{steps}, "state": {state}, "closed": {closed}, "seal": "{digest}", "copy": {copy}'

    def text(self) -> str:
        """The whole line, with its end."""
        fixed = {"fit": self.fit, "training": self.training, "after": self.after, "origin": self.origin}
        rest = json.dumps({**fixed, "phase": dict(self.phase), "head": self.head})
        return f'{{"steps": {self.changing(self.head)}, {rest.removeprefix("{")}\n'


@dataclass(frozen=True)
class Lines:
    """The fits in a journal.

    Args:
        lines: in the order of the file.
        whole: whether each line follows the one before it, and none was cut off.
    """

    lines: Sequence[FitLine] = ()
    whole: bool = True

    @property
    def head(self) -> str:
        """Head of the last line, or empty."""
        return self.lines[-1].head if self.lines else ""


def read_lines(file: Path) -> Lines:
    """What a journal holds; nothing if there is none.

    A line without an end is of a fit that had not begun when the disk was full, or it was cut off. If one of the two counts of
    a line is damaged, the process or the machine stopped while it was written: the other one counts, and one step more.

    Raises:
        JournalError: a line is no line of a fit, both its counts are damaged, or the file is no plain one.
    """
    try:
        content = read_plain(file, _MOST_BYTES)
    except OSError as error:
        raise JournalError(f"{file} cannot be read ({error}): expected a journal of private fits. {_REMEDY}") from error
    found: list[FitLine] = []
    whole = True
    texts = (content or b"").decode("utf-8", "replace").splitlines()
    if len(texts) > _MOST_LINES:
        raise JournalError(f"{file} has {len(texts)} lines: expected at most {_MOST_LINES}. {_REMEDY}")
    for number, text in enumerate(texts, start=1):
        if not text.endswith("}"):
            whole = whole and (not text or text.startswith('{"steps": 0 ') or '{"steps": 0 '.startswith(text))
            continue
        line = _read(text)
        if line is None:
            shown = repr(text[:200])
            raise JournalError(f"{file}, line {number}: {shown}: expected the line of a fit. {_REMEDY}")
        whole = whole and (not line.has_digest or line.after == (found[-1].head if found else ""))
        found.append(line)
    return Lines(found, whole)


def _read(text: str) -> FitLine | None:
    try:
        raw = json.loads(text)
        line = FitLine(raw["fit"], raw["training"], raw["phase"], raw.get("after", ""), raw.get("origin"))
        kinds = (type(line.fit), type(line.training), type(line.phase), type(line.after))
        if kinds != (str, str, dict, str) or not isinstance(line.origin, dict | None):
            return None
        counts = [(raw["steps"], raw["state"], raw.get("closed", 0), raw.get("seal", ""))]
        if "head" not in raw:  # as the first version wrote it
            return _counted(line, counts[0], has_digest=False) if "copy" not in raw and "seal" not in raw else None
        if raw["head"] != line.head:
            return None
        counts.append(tuple(raw["copy"]))
        whole = [count for count in counts if len(count) == 4 and count[3] == _digest(line.head, *count[:3])]
        if not whole:
            return None
        read = [made for count in whole if (made := _counted(line, count, has_digest=True)) is not None]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    if len(read) < len(whole):
        return None
    most = max(read, key=lambda made: (made.steps, made.closed))
    return most if len(whole) == 2 else replace(most, steps=most.steps + 1, state="open", closed=False)


def _counted(line: FitLine, count: tuple[Any, ...], *, has_digest: bool) -> FitLine | None:
    steps, state, closed, _ = count
    if type(steps) is not int or not 0 <= steps <= MOST_STEPS or state not in ("open", "ended") or closed not in (0, 1):
        return None
    return replace(
        line, steps=steps, state=state, closed=bool(closed) if has_digest else state == "ended", has_digest=has_digest
    )


def _digest(head: str, steps: object, state: object, closed: object) -> str:
    return hashlib.blake2b(f"{head}:{steps}:{state}:{closed}".encode(), digest_size=8).hexdigest()
