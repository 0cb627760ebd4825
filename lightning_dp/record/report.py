"""ledger → logger, privacy.json and the screen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_dp.accounting import EpsilonBound, Ledger, Statement
from lightning_dp.engines.user_code import warn_user
from lightning_dp.lightning_internals import either
from lightning_dp.mechanism import secure
from lightning_dp.plan.mechanism import Mechanism, NoiseKind
from lightning_dp.record.journal import Journal
from lightning_dp.record.loggers import tell_plan, tell_statement
from lightning_dp.record.panel import show
from lightning_dp.record.provenance import numbers_of_run
from lightning_dp.record.run_folder import RunFolder, journal_folder
from lightning_dp.record.run_record import RunRecord, text_of

SIMULATION = "SIMULATION at 1/{} of batch and noise, NOT PRIVATE as the run it stands for. Spent here"
CAVEATS_OF_NOISE: dict[NoiseKind, tuple[str, ...]] = {
    "floating": ("the noise is pseudorandom floating point, not a discrete Gaussian",),
    "discrete": secure.CAVEATS,
}
CAVEATS = (
    "choosing hyperparameters on the same data, and metrics computed from private examples, are not accounted for",
)


class Report:
    """Tells loggers and people what a run plans, spends and has spent.

    Args:
        ledger: where the spent steps are counted.
        randomness: ``"secret"`` or ``"reproducible"``.
        notes: caveats of this run, beside those of every run.

    Attributes:
        folder: where the journal of the run is kept, once :meth:`open` has found it; ``None`` to keep none.
        run: which run it is, as of :func:`~lightning_dp.record.provenance.run_facts`.
    """

    def __init__(
        self, ledger: Ledger, randomness: Literal["secret", "reproducible"], notes: tuple[str, ...] = ()
    ) -> None:
        self.ledger = ledger
        self.notes = notes
        self.randomness: Literal["secret", "reproducible"] = randomness
        self.folder: Path | None = None
        self.run: dict[str, Any] | None = None
        self._records: list[RunRecord] = []
        self._written: list[str] = []
        self._every, self._allowed, self._told, self._waited = 1, 0, 0, 0.0
        self._over = True

    def __getstate__(self) -> dict[str, object]:
        """A copy knows what was spent when it was made, and writes into nobody's record."""
        return {**self.__dict__, "_records": [], "_written": [], "_over": True}

    def open(self, trainer: pl.Trainer) -> None:
        """Find the run's folder. Called on every rank, before anything is written."""
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir talks to the other ranks
        self.folder, self._records, self._written, self._over = None, [], [], False
        settings = trainer  # Lightning sets what follows where type checkers do not see it
        self._every = settings.log_every_n_steps or 50  # type: ignore[attr-defined]  # set where type checkers do not see it
        if settings.fast_dev_run:  # type: ignore[attr-defined]  # set where type checkers do not see it
            return
        self.folder = journal_folder(folder)
        if RunFolder(folder).path is None:
            rank_zero_info(
                f"privacy.journal is kept in {self.folder}, since it is written in place at every step, which {folder} does "
                "not allow. Keep it if you mean to resume: a resume that does not find it says so in its statement."
            )
        if trainer.is_global_zero:
            logs = [
                logger.log_dir
                for logger in trainer.loggers
                if isinstance(logger, (*either(CSVLogger), *either(TensorBoardLogger)))
            ]
            self._records = [RunRecord(RunFolder(place)) for place in dict.fromkeys([str(folder), *map(str, logs)])]

    def start(
        self,
        trainer: pl.Trainer,
        engine: str,
        physical_batch_size: int,
        journal: Journal | None,
        seen: Mapping[str, str] | None = None,
    ) -> None:
        """Announce the plan to people and loggers, and write the record. Called on every rank before training.

        Args:
            trainer: whose loggers to tell.
            engine: its name.
            physical_batch_size: the most examples in a micro-batch.
            journal: of this fit, on the rank that keeps one.
            seen: what the look before the first step found: name → fact, for people.
        """
        self._waited, self._allowed, self._told = 0.0, -1, -1
        plan = self.ledger.plan
        style = "" if plan.clipping == "flat" else f" ({plan.clipping_rule})"
        bound = f"ε ≤ {plan.target_epsilon:g}" if plan.target_epsilon is not None else self._foreseen()
        title = "Differential privacy" if plan.simulation == 1 else SIMULATION.format(plan.simulation)
        show(
            f"{title}: {bound} at δ = {plan.delta:g}",
            {
                "protected": plan.neighbouring_relation,
                "steps": "an open number" if plan.steps is None else f"{plan.steps}",
                "noise": f"multiplier σ = {plan.noise_multiplier:.4g}, {self.randomness} randomness",
                "clipping": f"norm C = {plan.clip_norm:g}{style}",
                "batch": f"B = {plan.expected_batch_size:g} expected, of N = {plan.dataset_size} "
                f"(q = {plan.sampling_probability:.4g}), in micro-batches of up to {physical_batch_size}",
                "engine": engine,
                **(seen or {}),
            },
        )
        tell_plan(
            trainer,
            {**plan.numbers, "engine": engine, "world_size": trainer.world_size},
        )
        self._allow(self._ahead(self.ledger.steps + 1), _fits(journal))
        self.tell_if_more_is_allowed(trainer)

    def allow_charged(self, fits: Mapping[str, int]) -> None:
        """See to it that the record counts every step that is charged. Call it before a step is released.

        While training runs the record is an upper bound: it counts every step up to the next one at which loggers record,
        and at least a tenth more than are taken. So it is written seldom, and is true whenever the process is killed.

        Args:
            fits: name of each fit that led here → how many of its steps the ledger counts.

        Raises:
            JournalError: a record that says too little can be neither replaced nor removed.
        """
        if self.ledger.steps > self._allowed:
            self._allow(self._ahead(self.ledger.steps), fits)

    def _allow(self, steps: int, fits: Mapping[str, int]) -> None:
        self._allowed = steps
        for record in self._records:
            try:
                record.write(self._content(self.upper_bound()), "running", fits)
            except OSError as error:
                record.withdraw(error)
                rank_zero_info(
                    f"{record.place} cannot be written now ({error}): rather none than one that says too little."
                )

    def tell_if_more_is_allowed(self, trainer: pl.Trainer) -> None:
        """Give loggers the upper bound that is in the record, if it is another one than they have."""
        if self._records and self._told != self._allowed and not self._over:
            self._told = self._allowed
            tell_statement(trainer, self.upper_bound(), "running", "")

    def upper_bound(self) -> Statement:
        """The statement if all steps were taken that the record allows."""
        taken = self.ledger.steps
        if self._allowed <= taken:
            return self.statement(risk=False)
        statement = self.statement(risk=False, bound=self.ledger.epsilon(self._allowed))
        note = (
            f"training had not ended when this was written: it counts {self._allowed} steps, an upper bound, of which "
            f"{taken} were taken then; privacy.journal has the exact count"
        )
        return dataclasses.replace(statement, steps=self._allowed, caveats=[*statement.caveats, note])

    def _ahead(self, step: int) -> int:
        """How many steps the record is to count when the ``step``-th is about to be taken."""
        plan, most = self.ledger.plan, max(math.ceil(step / self._every) * self._every, math.ceil(1.1 * step))
        if plan.steps is not None and self.ledger.steps <= plan.steps:
            most = min(most, plan.steps)
        if plan.target_epsilon is not None and self.ledger.epsilon(most).epsilon > plan.target_epsilon:
            most = self.ledger.affordable_steps or most
        return most

    def metrics(self, every_n_steps: int, waited: float | None, released: Mechanism | None = None) -> dict[str, float]:
        """The ``dp/...`` metrics after a step. All but ``dp/data_wait`` are functions of public numbers alone.

        ``dp/data_wait`` is the time in seconds for which this rank has waited for the step's data. It depends on the draw, so
        it is left out where metrics of private examples are.
        ε is exact on the steps that loggers record and an upper bound in between (ε at the next recorded step).

        Args:
            every_n_steps: how often loggers record.
            waited: seconds for which all steps so far have waited for data (private), or ``None`` to say nothing of it.
            released: the mechanism of the last release. If it adapts C, ``dp/clip_norm`` is the C that it had: the noise on
                each coordinate of that gradient had a standard deviation of σ·S/B, where S follows from C.
        """
        steps, plan = self.ledger.steps, self.ledger.plan
        ahead = math.ceil(steps / every_n_steps) * every_n_steps if every_n_steps else steps
        if plan.steps is not None:
            ahead = max(steps, min(ahead, plan.steps))
        before, self._waited = self._waited, waited or 0.0
        found = {
            **({} if waited is None else {"dp/data_wait": waited - before}),
            "dp/epsilon": self.ledger.epsilon(ahead).epsilon,
            "dp/delta": plan.delta,
            "dp/noise_multiplier": plan.noise_multiplier,
            "dp/steps": float(steps),
        }
        if released is not None and released.clipping.adaptation is not None:
            found["dp/clip_norm"] = released.clipping.clip_norm
        return found if plan.simulation == 1 else {**found, "dp/simulation": float(plan.simulation)}

    def statement(self, risk: bool = True, bound: EpsilonBound | None = None) -> Statement:
        """What has been spent so far.

        Args:
            risk: whether to work out what it means for one person, which is left for the end of a fit.
            bound: on ε, in the place of that of the steps taken; each takes the accountant some time.
        """
        caveats = (*CAVEATS_OF_NOISE[self.ledger.plan.mechanism.noise.kind], *CAVEATS, *self.notes)
        return Statement.of(self.ledger, randomness=self.randomness, caveats=caveats, risk=risk, bound=bound)

    def write(self, trainer: pl.Trainer, journal: Journal | None, state: str, broken: int = 0) -> bool:
        """Write the record of a fit that is over, once, and give it to the loggers.

        Nothing happens in a process that has not trained.

        Args:
            trainer: whose loggers to tell.
            journal: as in :meth:`start`.
            state: ``"ended"`` or ``"interrupted"``.
            broken: how many gradients were not finite (private: it is told to whoever watches, and not written).

        Returns:
            Whether it was written now.
        """
        if broken:
            rank_zero_only(warn_user)(
                f"{broken} per-example gradients on rank 0 were not finite and contributed zero. (This count is private: it "
                "is not covered by the guarantee.) Look for divisions by zero or logarithms in the loss, or lower the rate."
            )
        if self._over:
            return False
        self._over, statement = True, self.statement()
        for record in self._records:
            try:
                record.write(self._content(statement), state, _fits(journal))
                self._written.append(record.place)
            except OSError as error:  # the training is done, and what it spent has to be known
                rank_zero_only(warn_user)(
                    f"{record.place} cannot be written ({error}): expected a folder with room. Make room, and save "
                    f"this in its place:\n{statement.to_json()}"
                )
        tell_statement(trainer, statement, state, text_of(self._content(statement), state, _fits(journal)))
        return True

    def tell_end(self) -> None:
        """Tell people what was spent, what it means for one of them, and where it is written."""
        statement = self.statement()
        show(
            "Differential privacy: training has ended",
            {"spent": str(statement), "risk": statement.in_words, "record": "\n".join(self._written)},
        )

    def write_for_child(self, trainer: pl.Trainer, fits: Mapping[str, int]) -> None:
        """Bring the record of a fit up to date that ran in processes of its own, and did not end well there.

        It is looked for where this process would have it; a logger that numbers its folders may have it elsewhere, and there
        it stays the upper bound that it is.

        Args:
            trainer: in the process that started the others.
            fits: as in :meth:`allow_charged`.
        """
        self.open(trainer)
        self._records = [record for record in self._records if record.is_there(fits)]
        for record in self._records:
            with suppress(OSError):
                record.write(self._content(self.statement()), "interrupted", fits)
        self._over = True

    def _content(self, statement: Statement) -> dict[str, Any]:
        """The statement, with all that it follows from and whose it is."""
        return {**statement.to_dict(), "run": self.run, **numbers_of_run(self.ledger, statement.steps)}

    def _foreseen(self) -> str:
        plan = self.ledger.plan
        if plan.noise_multiplier == 0:
            return "no noise, so ε = ∞ (no privacy)"
        return "ε grows" if plan.steps is None else f"ε = {self.ledger.epsilon(plan.steps).epsilon:.3g} at the end"


def _fits(journal: Journal | None) -> Mapping[str, int]:
    return {} if journal is None else journal.lineage.counted
