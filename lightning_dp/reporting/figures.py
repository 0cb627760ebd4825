"""The pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from io import BytesIO
from typing import Any

from lightning_dp.callbacks.raw_validation import raw_name
from lightning_dp.record.drawing import COLOURS, draw
from lightning_dp.reporting.facts import Published
from lightning_dp.reporting.logs import ReportError
from lightning_dp.reporting.runs import Run

UNKNOWN = "ε not known: privacy.json is missing"
Draw = Callable[[Any], None]
_MARKERS = "osDv^P"


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
        for place, run in enumerate(runs):
            last, (colour, marker, width) = run.series[metric][-1][1], _look(place, len(runs))
            if not math.isfinite(run.epsilon):
                what, style = (UNKNOWN, ":") if math.isnan(run.epsilon) else ("no privacy", "--")
                axes.axhline(last, ls=style, lw=width, color=colour, label=f"{run.label} ({what})")
            else:
                marker, what = ("X", "SIMULATION, ") if run.is_simulation else (marker, "")
                delta = run.statement["delta"] if run.statement else math.nan
                label = f"{run.label} ({what}δ = {delta:g})"
                axes.plot(run.epsilon, last, marker, color=colour, ms=6 + width, mec="white", zorder=3, label=label)
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
    """ε after every logged step, with the budget as a dotted line. Runs with the same curve, or budget, share its line."""

    def on(axes: Any) -> None:
        shown = [run for run in runs if run.statement is not None and "dp/epsilon" in run.series]
        curves = _shared((tuple(run.series["dp/epsilon"]), run.label) for run in shown)
        for place, (curve, names) in enumerate(curves):
            colour, _, width = _look(place, len(curves))
            axes.plot(*zip(*curve, strict=True), color=colour, lw=width, label=names)
        targets = [((run.statement or {}).get("target_epsilon"), run.label) for run in shown]
        for place, (target, names) in enumerate(_shared(one for one in targets if one[0] is not None)):
            label = f"budget ε = {target:g}" + (f": {names}" if len(shown) > 1 else "")
            axes.axhline(target, ls=(0, (1, 1 + place)), color="#444444", lw=1.2, label=label)
        axes.set(xlabel="private steps", ylabel="ε spent (upper bound)")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)

    return _png(on)


def validation_by_step(runs: Sequence[Run], metric: str) -> bytes:
    """``metric`` at every validation; averaged weights with solid lines, weights as trained with dashed ones.

    A run that has validated on both (``ExponentialMovingAverage(validate_raw=True)``) has a line of each.
    """

    def on(axes: Any) -> None:
        for place, run in enumerate(runs):
            colour, marker, width = _look(place, len(runs))
            raw = run.series.get(raw_name(metric))
            averaged = True if raw else run.averaged
            how = {True: "averaged weights", False: "weights as trained", None: "weights not known"}[averaged]
            lines = [(run.series[metric], how, "--" if averaged is False else "-")]
            lines += [(raw, "weights as trained", "--")] if raw else []
            for series, weights, style in lines:
                label = f"{run.label} ({weights})"
                axes.plot(*zip(*series, strict=True), marker + style, ms=2 + width, lw=width, color=colour, label=label)
        axes.set(xlabel="optimizer steps", ylabel=metric)
        axes.set_xlim(left=0)

    return _png(on)


def _look(place: int, of: int) -> tuple[str, str, float]:
    """Colour, marker and width of a line: earlier ones are wider, so that one is seen beneath another that covers it."""
    after = min(of - 1 - place, 4)
    return COLOURS[place % len(COLOURS)], _MARKERS[place // len(COLOURS) % len(_MARKERS)], 1.5 + after


def _shared(found: Iterable[tuple[Any, str]]) -> list[tuple[Any, str]]:
    """Each value once, with the names of all that have it."""
    names: dict[Any, list[str]] = {}
    for value, name in found:
        names.setdefault(value, []).append(name)
    return [(value, ", ".join(all_of)) for value, all_of in names.items()]


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
