"""What the Trainer's loggers are told: the plan in force, and what was spent."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dp.accounting import Statement
from lightning_dp.engines.user_code import warn_user
from lightning_dp.lightning_internals import either

REVISABLE = (WandbLogger, CSVLogger, TensorBoardLogger)
"""Loggers that take another value for a hyperparameter that they have."""

FIXED = ("delta", "clip_norm", "clipping", "target_epsilon", "unit", "adjacency")
"""Numbers of the plan that only the user changes; all others also follow from how far a training goes, on what."""


@rank_zero_only
def tell_plan(trainer: pl.Trainer, plan: Mapping[str, Any]) -> None:
    """Give every logger the plan's public numbers.

    A resumed or second fit has other ones (more steps, other ranks), and some loggers refuse a hyperparameter that changes.
    Those that are known to take it get them all as hyperparameters; MLflow gets tags, which may change; any other logger gets
    :data:`FIXED` as hyperparameters and the other numbers as metrics ``dp/plan/...``.

    Args:
        trainer: whose loggers.
        plan: name → value.
    """
    for logger in trainer.loggers:
        if isinstance(logger, either(MLFlowLogger)):
            _set_tags(logger, {f"dp/{name}": value for name, value in plan.items()})
        elif any(isinstance(logger, either(kind)) for kind in REVISABLE):
            logger.log_hyperparams({"dp": dict(plan)})
        else:
            _tell_stranger(logger, plan, trainer.global_step)


@rank_zero_only
def tell_statement(trainer: pl.Trainer, statement: Statement, state: str, text: str) -> None:
    """Give the loggers what was spent: in their summary or tags, and as an artifact when a fit is over.

    Args:
        trainer: whose loggers.
        statement: what was spent, or an upper bound on it while the fit is running.
        state: ``"running"``, ``"interrupted"`` or ``"ended"``.
        text: what stands in ``privacy.json``.
    """
    sentence = str(statement) if state != "running" else f"still running, at most: {statement}"
    for logger in trainer.loggers:
        try:
            _tell(logger, statement, sentence, state, text)
        except Exception as error:  # the training is done, or ends for a reason of its own
            warn_user(
                f"{type(logger).__name__} did not take what was spent ({type(error).__name__}: {error}): expected a logger "
                f"that can be reached. It is in the record of the run all the same: {sentence}"
            )


def _tell(logger: Logger, statement: Statement, sentence: str, state: str, text: str) -> None:
    over = state != "running"
    if isinstance(logger, either(WandbLogger)):
        run = logger.experiment
        run.summary["dp/statement"] = sentence
        run.summary["privacy"] = {**statement.to_dict(), "state": state}
        if over:
            artifact = import_module("wandb").Artifact(f"privacy-{run.id}", type="privacy")
            with artifact.new_file("privacy.json", encoding="utf-8") as file:
                file.write(text)
            run.log_artifact(artifact)
    elif isinstance(logger, either(MLFlowLogger)):
        spent = {
            "statement": sentence,
            "state": state,
            "epsilon_spent": statement.epsilon,
            "steps_spent": statement.steps,
            **_risk(statement),
        }
        _set_tags(logger, {f"dp/{name}": value for name, value in spent.items()})
        if over:
            logger.experiment.log_text(logger.run_id, text, "privacy.json")
    elif isinstance(logger, either(TensorBoardLogger)) and over:
        text = "\n\n".join(filter(None, (sentence, statement.in_words)))
        logger.experiment.add_text("dp/statement", text, statement.steps)


def _risk(statement: Statement) -> dict[str, float | str]:
    risk = statement.risk
    if risk is None:
        return {}
    rates = {f"tpr_at_fpr_{rate}": value for rate, value in risk.tpr_at_fpr.items()}
    return {"risk": statement.in_words, "mu": risk.mu, "advantage": risk.advantage, **rates}


def _set_tags(logger: MLFlowLogger, tags: Mapping[str, Any]) -> None:
    for name, value in tags.items():
        logger.experiment.set_tag(logger.run_id, name, str(value))


def _tell_stranger(logger: Logger, plan: Mapping[str, Any], step: int) -> None:
    fixed = {name: value for name, value in plan.items() if name in FIXED}
    numbers = {
        f"dp/plan/{name}": float(value)
        for name, value in plan.items()
        if name not in FIXED and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    try:
        logger.log_hyperparams({"dp": fixed})
    except Exception as error:
        warn_user(
            f"{type(logger).__name__} did not take the privacy settings as hyperparameters ({type(error).__name__}: {error}): "
            "expected a logger that takes new values. Training goes on; the settings in force are in privacy.json."
        )
    logger.log_metrics(numbers, step)
