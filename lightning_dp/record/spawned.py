"""What processes started by the Trainer tell the callback that stayed behind in the process that started them.

With the start methods ``spawn`` and ``fork`` (``ddp_spawn``, ``ddp_fork``, ``ddp_notebook``) training happens in children.
Lightning brings weights and metrics home when they end well; what was spent has to be known however they end. So the child
keeps it in a small file, whose name both know, and writes every charge down there before the step is released. Whoever asks
the callback in the starting process gets what the file says.
"""

from __future__ import annotations

import json
import os
import stat
import tempfile
import uuid
import weakref
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import lightning.pytorch as pl

from lightning_dp.accounting import Assumptions, Ledger
from lightning_dp.lightning_internals import starts_processes
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record.checkpoint import Spent, read_with_digest, with_digest
from lightning_dp.record.journal import Journal, JournalError
from lightning_dp.record.report import Report

_WIDTH = 20
_waiting: weakref.WeakValueDictionary[str, object] = weakref.WeakValueDictionary()


def register(recipient: object, address: str | None = None) -> str:
    """The file in which children of this process tell ``recipient`` what they have spent. It is not made yet.

    Args:
        recipient: kept only as long as somebody else holds it; the file goes with it.
        address: the one it had where it was pickled. It stays valid in a child; a copy made in this process, where the
            original still waits, gets another.
    """
    if address is None or _waiting.get(address, recipient) is not recipient:
        address = str(Path(tempfile.gettempdir()).absolute() / f"lightning_dp-{uuid.uuid4().hex}")
        weakref.finalize(recipient, _forget_at_home, address, os.getpid())
    _waiting[address] = recipient
    return address


def in_a_child(trainer: pl.Trainer) -> bool:
    """Whether the Trainer has started the process in which it trains."""
    return starts_processes(trainer.strategy.launcher)


def forget(address: str) -> None:
    """Remove what children have told, once it is taken over."""
    with suppress(OSError):
        os.unlink(address)


class ToParent:
    """The child's side.

    Args:
        address: of the callback that waits.
        report: of this fit.
        spent: what was spent when this fit began, and its lineage.
        journal: of this fit, on the rank that keeps one.

    Raises:
        JournalError: the file cannot be written, so what is spent could not become known.
    """

    def __init__(self, address: str, report: Report, spent: Spent, journal: Journal | None) -> None:
        self._facts = {
            "plan": report.ledger.plan.numbers,
            "numbers": report.ledger.numbers,
            "spent": with_digest(spent),
            "fit": None if journal is None else journal.name,
            "randomness": report.randomness,
            "notes": report.notes,
            "run": report.run,
        }
        self._address, self._counts, self._spent = address, (0, spent.unused_samples), spent
        self._descriptor: int | None = None
        self._write()

    def __getstate__(self) -> NoReturn:
        raise TypeError("The file in which a child tells its parent what it spends is never copied.")

    def charged(self, steps: int) -> None:
        """``steps`` steps of this fit are charged. Call it before the last of them is released.

        Raises:
            JournalError: it cannot be written down, so the step must not be released.
        """
        self._tell(steps, self._counts[1])

    def unused(self, samples: int) -> None:
        """So many samples were drawn and not stepped on."""
        if samples != self._counts[1]:
            self._tell(self._counts[0], samples)

    def close(self, carried: MechanismState = NOTHING) -> None:
        """Write nothing more; the file stays for the process that waits.

        Args:
            carried: what the mechanism carries to the next step.
        """
        if self._descriptor is not None and carried != self._spent.carried:
            self._facts["spent"] = with_digest(replace(self._spent, carried=carried))
            self._write()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _write(self) -> None:
        """The whole file anew."""
        try:
            handle, name = tempfile.mkstemp(
                dir=Path(self._address).parent, prefix="lightning_dp-"
            )  # for its owner alone
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(_header(*self._counts) + json.dumps(self._facts))
            os.replace(name, self._address)
            if self._descriptor is not None:
                os.close(self._descriptor)
            self._descriptor = os.open(self._address, os.O_WRONLY)
        except OSError as error:
            raise self._error(error) from error

    def _tell(self, steps: int, unused: int) -> None:
        self._counts = steps, unused
        if self._descriptor is not None:
            try:
                os.pwrite(self._descriptor, _header(steps, unused).encode(), 0)
            except OSError as error:
                raise self._error(error) from error

    def _error(self, error: OSError) -> JournalError:
        return JournalError(
            f"{self._address} cannot be written ({error}): expected a folder for temporary files with room, since what "
            "processes started by the Trainer spend has to become known in this one. Make room, or set TMPDIR."
        )


@dataclass(frozen=True)
class News:
    """What a child has spent, as the callback needs it.

    Args:
        raw: what stands in the file, to tell whether it is new.
        report: with the ledger.
        spent: all that is spent, for a checkpoint or the next fit.
    """

    raw: bytes
    report: Report
    spent: Spent


def from_child(address: str, known: bytes) -> News | None:
    """The parent's side: what children have told, or ``None`` if there is nothing that is not ``known``.

    Raises:
        PreflightError, ValueError: the file was changed.
    """
    try:
        descriptor = os.open(address, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        what = os.fstat(descriptor)
        if not stat.S_ISREG(what.st_mode) or (hasattr(os, "getuid") and what.st_uid != os.getuid()):
            return None
        raw = file.read()
    if raw == known:
        return None
    text = raw.decode("utf-8")
    steps, unused = int(text[:_WIDTH]), int(text[_WIDTH : 2 * _WIDTH])
    facts = json.loads(text[2 * _WIDTH :])
    before = read_with_digest(facts["spent"])
    state = {**before.ledger, "phases": [*before.ledger["phases"], {**facts["numbers"], "steps": steps}]}
    ledger = Ledger.resume(PrivacyPlan(**facts["plan"]), state, Assumptions.read(facts["numbers"]))
    lineage = before.lineage
    if lineage is not None and facts["fit"] is not None:
        lineage = replace(lineage, counted={**lineage.counted, facts["fit"]: steps})
    spent = Spent(ledger.state_dict(), lineage, before.world_size, unused, carried=before.carried)
    report = Report(ledger, facts["randomness"], tuple(facts["notes"]))
    report.run = facts["run"]
    return News(raw, report, spent)


def _header(steps: int, unused: int) -> str:
    return f"{steps:<{_WIDTH}d}{unused:<{_WIDTH}d}"


def _forget_at_home(address: str, process: int) -> None:
    if os.getpid() == process:  # a child that was forked has this function too
        forget(address)
