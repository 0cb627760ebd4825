"""Who is told of every step that is charged, before it is released."""

from __future__ import annotations

from lightning_dp.record.journal import Journal
from lightning_dp.record.report import Report
from lightning_dp.record.spawned import ToParent


class Witness:
    """Has a charge written down: for the process that started this one, in the run's record, and in its journal.

    Args:
        report: keeps ``privacy.json``.
        journal: keeps ``privacy.journal``; ``None`` on the ranks that keep none.
        parent: is told of the steps, if the Trainer has started this process.
    """

    def __init__(self, report: Report, journal: Journal | None, parent: ToParent | None) -> None:
        self._report, self._journal, self._parent = report, journal, parent

    def __call__(self, steps: int) -> None:
        """``steps`` steps of this fit are charged.

        Raises:
            JournalError: it cannot be written down, so the step must not be released.
        """
        if self._parent is not None:
            self._parent.charged(steps)
        if self._journal is not None:
            self._report.allow_charged(self._journal.lineage.counted)
            self._journal.record(steps)
