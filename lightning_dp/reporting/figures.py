"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib import import_module
from io import BytesIO
from typing import Any

from lightning_dp.callbacks.raw_validation import raw_name
from lightning_dp.record.drawing import COLOURS, draw
from lightning_dp.reporting.facts import Published
from lightning_dp.reporting.runs import ReportError, Run

UNKNOWN = "ε not known: privacy.json is missing"
Draw = Callable[[Any], None]


def accuracy_against_epsilon(runs: Sequence[Run], metric: str, published: Sequence[Published]) -> bytes:
    """Last ``metric`` of every run at the ε it spent, beside published curves.

    A run without privacy is a dashed line, one whose ε is not known a dotted one.
    """

    def on(axes: Any) -> None:
        for place, curve in enumerate(published):
            colour = ("#888888", "#444444", "#AAAAAA")[place % 3]
            axes.plot(*zip(*curve.points, strict=True), "-", color=colour, lw=1, zorder=1)
            for epsilon, accuracy in curve.points:
                face = "white" if epsilon in curve.unconfirmed else colour
                axes.plot(epsilon, accuracy, "s^D"[place % 3], color=colour, mfc=face, ms=6, zorder=2)
            line = "-" if len(curve.points) > 1 else ""
            axes.plot([], [], "s^D"[place % 3] + line, color=colour, label=f"{curve.label} (δ = {curve.delta:g})")
        for run, colour in zip(runs, _cycle(runs), strict=True):
            last = run.series[metric][-1][1]
            if not math.isfinite(run.epsilon):
                what, style = (UNKNOWN, ":") if math.isnan(run.epsilon) else ("no privacy", "--")
                axes.axhline(last, ls=style, color=colour, label=f"{run.name} ({what})")
            else:
                marker, what = ("X", "SIMULATION, ") if run.is_simulation else ("o", "")
                delta = run.statement["delta"] if run.statement else math.nan
                axes.plot(
                    run.epsilon, last, marker, color=colour, ms=9, zorder=3, label=f"{run.name} ({what}δ = {delta:g})"
                )
        axes.set(xscale="log", xlabel="ε spent (logarithmic)", ylabel=metric)
        ticker = import_module("matplotlib.ticker")
        low, high = axes.get_xlim()
        written = "2345678" if high / low < 20 else "25" if high / low < 500 else ""  # as many as do not overlap
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(ticker.FuncFormatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in written else ""))
        if any(curve.unconfirmed for curve in published):
            axes.plot(
                [], [], "s", color="#888888", mfc="white", label="hollow: published figure without a second source"
            )

    return _png(on)


def budget_by_step(runs: Sequence[Run]) -> bytes:
    """ε after every logged step, with the budget as a dotted line."""

    def on(axes: Any) -> None:
        for run, colour in zip(runs, _cycle(runs), strict=True):
            if run.statement is None or "dp/epsilon" not in run.series:
                continue
            axes.plot(*zip(*run.series["dp/epsilon"], strict=True), color=colour, label=run.name)
            if run.statement.get("target_epsilon") is not None:
                target = run.statement["target_epsilon"]
                axes.axhline(target, ls=":", color=colour, lw=1, label=f"{run.name}: budget ε = {target:g}")
        axes.set(xlabel="private steps", ylabel="ε spent (upper bound)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _png(on)


def validation_by_step(runs: Sequence[Run], metric: str) -> bytes:
    """``metric`` at every validation; averaged weights with solid lines, weights as trained with dashed ones.

    A run that has validated on both (``ExponentialMovingAverage(validate_raw=True)``) has a line of each.
    """

    def on(axes: Any) -> None:
        for run, colour in zip(runs, _cycle(runs), strict=True):
            raw = run.series.get(raw_name(metric))
            averaged = True if raw else run.averaged
            how = {True: "averaged weights", False: "weights as trained", None: "weights not known"}[averaged]
            lines = [(run.series[metric], how, "--" if averaged is False else "-")]
            lines += [(raw, "weights as trained", "--")] if raw else []
            for series, weights, style in lines:
                axes.plot(*zip(*series, strict=True), "o" + style, ms=4, color=colour, label=f"{run.name} ({weights})")
        axes.set(xlabel="optimizer steps", ylabel=metric)
        axes.set_xlim(left=0)

    return _png(on)


def _cycle(runs: Sequence[Run]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _png(on: Draw) -> bytes:
    try:
        figure = draw(on)
    except ModuleNotFoundError as error:
        raise ReportError(
            "matplotlib is not installed: expected it for drawing. pip install 'lightning-dp[report]' brings it."
        ) from error
    content = BytesIO()
    figure.savefig(content, format="png", dpi=150)
    return content.getvalue()
