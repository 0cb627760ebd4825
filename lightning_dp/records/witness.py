"""Who is told of every step that is charged, before it is released."""

from __future__ import annotations

from lightning_dp.records.journal import Journal
from lightning_dp.records.report import Report


class Witness:
    """Has a charge written down in the run's record and its journal.

    Args:
        report: keeps ``privacy.json``.
        journal: keeps ``privacy.journal``.
    """

    def __init__(self, report: Report, journal: Journal) -> None:
        self._report, self._journal = report, journal

    def __call__(self, steps: int) -> None:
        """``steps`` steps of this fit are charged.

        Raises:
            JournalError: it cannot be written down, so the step must not be released.
        """
        self._report.allow_charged(self._journal.lineage.counted)
        self._journal.record(steps)
