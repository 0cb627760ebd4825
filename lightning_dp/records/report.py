"""ledger → logger, privacy.json and the sentence at the end."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from lightning_dp import secure
from lightning_dp.accounting import Ledger, Statement
from lightning_dp.engines.select import Selection
from lightning_dp.engines.user_code import warn_user
from lightning_dp.plan import EXAMPLE
from lightning_dp.private_step import PrivateStep
from lightning_dp.records.whole_file import write_whole

SIMULATION = "SIMULATION at 1/{} of batch and noise, NOT PRIVATE as the run it stands for. Spent here"
FILE_NAME = "privacy.json"
CAVEATS = (
    "the noise is pseudorandom floating point, not a discrete Gaussian",
    "choosing hyperparameters on the same data, and metrics computed from private examples, are not accounted for",
)


class Report:
    """Tells loggers and people what a run plans, spends and has spent.

    Args:
        ledger: where the spent steps are counted.
        randomness: ``"secret"`` or ``"reproducible"``.
        notes: caveats of this run, beside those of every run.
    """

    def __init__(
        self, ledger: Ledger, randomness: Literal["secret", "reproducible"], notes: tuple[str, ...] = ()
    ) -> None:
        self.ledger = ledger
        self.notes = notes
        self.randomness: Literal["secret", "reproducible"] = randomness
        self.folder: Path | None = None
        self._waited = 0.0

    def start(self, trainer: pl.Trainer, step: PrivateStep, selection: Selection) -> None:
        """Announce the plan to people and loggers. Called on every rank before training."""
        folder = trainer.log_dir or trainer.default_root_dir  # log_dir talks to the other ranks
        self.folder = None if trainer.fast_dev_run else Path(folder)  # type: ignore[attr-defined]  # set where type checkers do not see it
        if self.folder is not None and trainer.is_global_zero:
            (self.folder / FILE_NAME).unlink(
                missing_ok=True
            )  # from the first step on an older one would say too little
        self._waited = 0.0
        plan = self.ledger.plan
        steps = "an open number of steps" if plan.steps is None else f"{plan.steps} steps"
        style = "" if plan.clipping == "flat" else f" ({plan.clipping_rule})"
        bound = f"ε ≤ {plan.target_epsilon:g}" if plan.target_epsilon is not None else self._foreseen()
        title = "Differential privacy" if plan.simulation == 1 else SIMULATION.format(plan.simulation)
        title += "" if plan.unit == EXAMPLE else f" ({plan.neighbouring_relation})"
        rank_zero_info(
            f"{title}: {bound} at δ = {plan.delta:g} over {steps}: noise multiplier "
            f"{plan.noise_multiplier:.4g}, clip norm {plan.clip_norm:g}{style}, expected batch {plan.expected_batch_size:g} of "
            f"{plan.dataset_size} (q = {plan.sampling_probability:.4g}), engine {selection.engine.name}, micro-batches of "
            f"up to {step.physical_batch_size}, {self.randomness} randomness."
        )
        for logger in trainer.loggers:
            logger.log_hyperparams(
                {"dp": {**dataclasses.asdict(plan), "engine": selection.engine.name, "world_size": trainer.world_size}}
            )

    def metrics(self, every_n_steps: int, waited: float | None) -> dict[str, float]:
        """The ``dp/...`` metrics after a step. All but ``dp/data_wait`` are functions of public numbers alone.

        ``dp/data_wait`` is the time in seconds for which this rank has waited for the step's data. It depends on the draw, so
        it is left out where metrics of private examples are.
        ε is exact on the steps that loggers record and an upper bound in between (ε at the next recorded step).

        Args:
            every_n_steps: how often loggers record.
            waited: seconds for which all steps so far have waited for data (private), or ``None`` to say nothing of it.
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
        return found if plan.simulation == 1 else {**found, "dp/simulation": float(plan.simulation)}

    def statement(self) -> Statement:
        """What has been spent so far."""
        caveats = CAVEATS if self.ledger.plan.resolution is None else (*secure.CAVEATS, *CAVEATS[1:])
        return Statement.of(self.ledger, randomness=self.randomness, caveats=(*caveats, *self.notes))

    @rank_zero_only
    def write(self, trainer: pl.Trainer, broken: int = 0) -> None:
        """Write ``privacy.json`` and the statement into the summary of W&B runs.

        Args:
            trainer: whose loggers to tell.
            broken: how many gradients were not finite (private: it is told to whoever watches, and not written).
        """
        if broken:
            warn_user(
                f"{broken} per-example gradients on rank 0 were not finite and contributed zero. (This count is private: it "
                "is not covered by the guarantee.) Look for divisions by zero or logarithms in the loss, or lower the rate."
            )
        statement = self.statement()
        if self.folder is not None:
            try:
                write_whole(self.folder / FILE_NAME, statement.to_json() + "\n")
            except OSError as error:  # the training is done, and what it spent has to be known
                warn_user(
                    f"{self.folder / FILE_NAME} cannot be written ({error}): expected a folder with room. Make room, and save "
                    f"this in its place:\n{statement.to_json()}"
                )
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.summary["dp/statement"] = str(statement)
                logger.experiment.summary["privacy"] = statement.to_dict()

    def _foreseen(self) -> str:
        plan = self.ledger.plan
        if plan.noise_multiplier == 0:
            return "no noise, so ε = ∞ (no privacy)"
        return "ε grows" if plan.steps is None else f"ε = {self.ledger.epsilon(plan.steps).epsilon:.3g} at the end"
