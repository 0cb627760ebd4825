"""What one callback has spent: over all its fits, its copies, and the processes that a Trainer starts for it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_dp.accounting import Ledger
from lightning_dp.mechanism.filtering import FilterState
from lightning_dp.mechanism.state import NOTHING
from lightning_dp.record.checkpoint import Spent, of_a_copy
from lightning_dp.record.journal import Journal
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.logged_figures import Validated, tell_figures
from lightning_dp.record.provenance import run_facts
from lightning_dp.record.report import Report
from lightning_dp.record.spawned import ToParent, forget, from_child, in_a_child, register
from lightning_dp.record.witness import Witness


class Account:
    """The ledger of a callback and everything that writes it down.

    Between :meth:`start_fit` and :meth:`open` a plan is made; from :meth:`open` on each step is written down before it is
    released; :meth:`close` ends that.

    Attributes:
        before: what was spent before the plan in force, with the steps found in journals; ``None`` if nothing was.
        unused_samples: how many samples were drawn and not stepped on, over all fits.
        carried: what the mechanism carries to the next step.
        filtered: what a gradient filter carries to the next step of the fit.
    """

    def __init__(self) -> None:
        self.before: Spent | None = None
        self.unused_samples = 0
        self.carried = NOTHING
        self.filtered = FilterState()
        self._ledger: Ledger | None = None
        self._report: Report | None = None
        self._world_size: int | None = None
        self._journal: Journal | None = None
        self._to_parent: ToParent | None = None
        self._address = register(self)
        self._at_home, self._heard = True, b""
        self._validated = Validated()

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on from all that is spent; what a fit holds open stays with the original."""
        return {**self.__dict__, "before": self.now(), "_journal": None, "_to_parent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        address = register(self, self._address)
        self.before = self.before if address == self._address else of_a_copy(self.before)  # not in a child
        self._address = address

    @property
    def lineage(self) -> Lineage | None:
        """Of the fits before this one."""
        return None if self.before is None else self.before.lineage

    @property
    def address(self) -> str:
        """The file in which child processes tell what they have spent."""
        return self._address

    @property
    def ledger(self) -> Ledger | None:
        """What is spent, once the training data are known; also by processes that the Trainer started."""
        self.hear()
        return self._ledger

    @property
    def report(self) -> Report | None:
        """What says so to people, loggers and files, once the training data are known."""
        self.hear()
        return self._report

    def hear(self, trainer: pl.Trainer | None = None) -> None:
        """Take over what children have spent, if they have told anything since; given the Trainer, write it down too."""
        news = from_child(self._address, self._heard) if self._at_home else None
        if news is None:
            return
        self._heard, self.before, self._journal, self._report = news.raw, news.spent, None, news.report
        self._ledger, self._world_size = news.report.ledger, news.spent.world_size
        self.unused_samples, self.carried = news.spent.unused_samples, news.spent.carried
        if trainer is not None and news.spent.lineage is not None:
            news.report.write_for_child(trainer, news.spent.lineage.counted)

    def now(self) -> Spent | None:
        """What this and all earlier fits have spent so far, for a checkpoint or the next fit."""
        ledger = self.ledger
        if ledger is None:
            return self.before
        lineage = self.lineage if self._journal is None else self._journal.lineage
        return Spent(ledger.state_dict(), lineage, self._world_size, self.unused_samples, carried=self.carried)

    def resume(self, spent: Spent | None) -> None:
        """Go on from what a checkpoint says."""
        self.before = spent
        self.unused_samples = 0 if spent is None else spent.unused_samples
        self.carried = NOTHING if spent is None else spent.carried

    def start_fit(self, trainer: pl.Trainer) -> None:
        """A fit begins: all that was spent so far was spent before it."""
        self.before = self.now()
        self.filtered = FilterState()
        self._validated = Validated()
        self._at_home = not in_a_child(trainer)
        if self._at_home:
            forget(self._address)

    def plan(self, ledger: Ledger, report: Report, world_size: int) -> None:
        """The plan of the fit is made: ``ledger`` holds it, and ``report`` will say what it spends."""
        self._ledger, self._report, self._world_size = ledger, report, world_size

    def open(self, trainer: pl.Trainer, ledger: Ledger, report: Report, facts: str) -> Journal | None:
        """From here on every step is written down before it is released.

        Args:
            trainer: of whose folders and loggers the record is kept.
            ledger: of the fit.
            report: of the fit.
            facts: see :mod:`lightning_dp.record.course`.

        Returns:
            The journal, on the rank that keeps one.
        """
        report.open(trainer)
        if trainer.is_global_zero:
            self._journal = Journal(report.folder, ledger.numbers, self.lineage, facts)
        report.run = run_facts(trainer, ledger, self._journal)
        now = self.now()
        if in_a_child(trainer) and trainer.local_rank == 0 and now is not None:
            self._to_parent = ToParent(self._address, report, now, self._journal)
        ledger.witness = Witness(report, self._journal, self._to_parent)
        return self._journal

    def samples_unused(self, samples: int) -> None:
        """So many samples were drawn and not stepped on."""
        self.unused_samples = samples
        if self._to_parent is not None:
            self._to_parent.unused(samples)

    def validated(self, trainer: pl.Trainer) -> None:
        """A validation has ended; what it has logged is drawn against ε at the end."""
        if self._ledger is not None:
            self._validated.see(trainer, self._ledger.steps)

    def write(self, trainer: pl.Trainer, state: str, broken: int = 0) -> None:
        """Write the record of a fit that is over, if it had come as far as a plan, and give figures to the loggers.

        Args:
            trainer: whose loggers to tell.
            state: ``"ended"`` or ``"interrupted"``.
            broken: how many gradients were not finite (private: it is told to whoever watches, and not written).
        """
        if self._report is None:
            return
        now = self._report.write(trainer, self._journal, state, broken)
        if now and state == "ended":
            tell_figures(trainer, self._report.ledger, self._validated)

    def close(self, *, ended: bool) -> None:
        """Write nothing more.

        Args:
            ended: whether the fit came to its end. If it took all the steps it had planned, the journal says so.
        """
        ledger = self.ledger if ended else None
        planned = None if ledger is None else ledger.plan.steps
        if self._journal is not None:
            self._journal.close(ended=ledger is not None and planned is not None and ledger.steps >= planned)
        if self._to_parent is not None:
            self._to_parent.close(self.carried)
