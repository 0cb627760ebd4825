"""Figures for the loggers that take them, when a fit has ended: ε by step, and what was validated against ε."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dp.accounting import Ledger
from lightning_dp.engines.user_code import warn_user
from lightning_dp.lightning_internals import either
from lightning_dp.record.drawing import COLOURS, draw

TAKE_FIGURES = (TensorBoardLogger, WandbLogger, MLFlowLogger)
MOST_METRICS, MOST_POINTS, FRESH_POINTS = 4, 200, 25
SECONDS = 1.0
"""After which no ε is asked for that training has not asked for."""
VALIDATED = re.compile(r"(?<![a-z])val(id|idation)?(?![a-z])")
"""In a name: of a validation. ``value_loss`` and ``interval_loss`` may be of training, and are not noised."""
Series = list[tuple[int, float]]


class Validated:
    """What the validations of a fit have logged, and after how many private steps.

    Only numbers named as those of a validation are kept (:data:`VALIDATED`, and ``acc`` or ``loss``), at most
    :data:`MOST_METRICS` of them, and none that the loggers do not have anyhow.
    """

    def __init__(self) -> None:
        self.series: dict[str, Series] = {}

    def see(self, trainer: pl.Trainer, steps: int) -> None:
        """A validation has ended. Called on every rank, since metrics may be summed over them when they are read."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not _takers(trainer):
            return
        for name, value in trainer.callback_metrics.items():
            small = name.lower()
            if not VALIDATED.search(small) or not ("acc" in small or "loss" in small) or small.startswith("dp/"):
                continue
            if name not in trainer.logged_metrics:  # kept from the loggers, on purpose
                continue
            if name in self.series or len(self.series) < MOST_METRICS:
                self.series.setdefault(name, []).append((steps, float(value)))


@rank_zero_only
def tell_figures(trainer: pl.Trainer, ledger: Ledger, validated: Validated) -> None:
    """Draw, and give the figures to the loggers that take them. Nothing that goes wrong here ends a training.

    Without matplotlib, without noise and without such a logger nothing is drawn.

    Args:
        trainer: whose loggers.
        ledger: of the fit that has ended.
        validated: what it has logged.
    """
    loggers = _takers(trainer)
    if not loggers or not ledger.steps or find_spec("matplotlib") is None:
        return
    try:
        every = getattr(trainer, "log_every_n_steps", None) or 50
        figures = figures_of(ledger, validated.series, every)
    except Exception as error:
        warn_user(f"the figures of ε could not be drawn ({_said(error)}): {_REMEDY}")
        return
    for logger in loggers if figures else ():
        try:
            _give(logger, figures, trainer.global_step)
        except Exception as error:
            warn_user(f"{type(logger).__name__} did not take the figures of ε ({_said(error)}): {_REMEDY}")


_REMEDY = "expected matplotlib and a logger that can be reached. The run and its record are not touched by this."


def figures_of(ledger: Ledger, validated: Mapping[str, Series], every: int) -> dict[str, Any]:
    """Name → figure; none if ε is infinite.

    Args:
        ledger: what was spent.
        validated: name of a metric → (private steps, value).
        every: how often loggers record. ε at these steps is known from training.
    """
    if not math.isfinite(ledger.epsilon().epsilon):
        return {}
    plan = ledger.plan
    title = f"δ = {plan.delta:g}, {plan.neighbouring_relation}"
    if plan.simulation != 1:
        title = f"SIMULATION at 1/{plan.simulation} of batch and noise; {title}"
    spent = [(steps, ledger.epsilon(steps).epsilon) for steps in _steps(ledger, every)]
    figures = {"dp/epsilon_by_step": draw(partial(_budget, spent, plan.target_epsilon), title=title)}
    for name, series in validated.items():
        points = [(ledger.epsilon(_recorded(ledger, steps, every)).epsilon, value) for steps, value in series]
        kept = [point for point in points if all(map(math.isfinite, point))]
        if kept:
            figures[f"dp/{name}_by_epsilon"] = draw(partial(_validated_line, kept, name), title=title)
    return figures


def _steps(ledger: Ledger, every: int) -> list[int]:
    """At which steps ε is drawn: where loggers have it; and, while that takes little time, some more in between."""
    known = range(0, ledger.steps, max(every, math.ceil(ledger.steps / (MOST_POINTS * every)) * every))
    wanted = {*known, ledger.steps}
    if ledger.epsilon().accountant in ("PRV", "exact"):
        began = time.monotonic()
        for place in range(1, FRESH_POINTS):
            if time.monotonic() - began > SECONDS:
                break
            wanted.add(ledger.steps * place // FRESH_POINTS)
            ledger.epsilon(ledger.steps * place // FRESH_POINTS)
    return sorted(wanted)


def _recorded(ledger: Ledger, steps: int, every: int) -> int:
    """The step at which loggers next have ε: what is true there is an upper bound before."""
    return max(steps, min(math.ceil(steps / every) * every, ledger.steps))


def _budget(spent: Sequence[tuple[int, float]], target: float | None, axes: Any) -> None:
    steps, epsilons = zip(*spent, strict=True)
    axes.plot(
        steps, epsilons, drawstyle="steps-pre", color=COLOURS[0], label="ε spent, an upper bound"
    )  # between points too
    if target is not None:
        axes.axhline(target, ls=":", color=COLOURS[1], label=f"budget ε = {target:g}")
    axes.set(xlabel="private steps", ylabel="ε spent (upper bound)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)


def _validated_line(points: Sequence[tuple[float, float]], name: str, axes: Any) -> None:
    axes.plot(*zip(*points, strict=True), "o-", ms=4, color=COLOURS[0])
    axes.set(xlabel="ε spent (upper bound)", ylabel=name)
    axes.set_xlim(left=0)


def _give(logger: Any, figures: Mapping[str, Any], step: int) -> None:
    for name, figure in figures.items():
        if isinstance(logger, either(WandbLogger)):
            logger.log_image(key=name, images=[figure], step=step)
        elif isinstance(logger, either(MLFlowLogger)):
            file = re.sub(r"[^\w.-]", "_", name.removeprefix("dp/"))
            logger.experiment.log_figure(logger.run_id, figure, f"dp/{file}.png")
        else:
            logger.experiment.add_figure(name, figure, global_step=step)


def _takers(trainer: pl.Trainer) -> list[Any]:
    return [logger for logger in trainer.loggers if any(isinstance(logger, either(kind)) for kind in TAKE_FIGURES)]


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
