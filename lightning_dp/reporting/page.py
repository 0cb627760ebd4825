"""One HTML page that needs no other file."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_dp.accounting.risk import percent, round_up
from lightning_dp.callbacks.raw_validation import raw_name
from lightning_dp.reporting.facts import Published
from lightning_dp.reporting.figures import UNKNOWN
from lightning_dp.reporting.runs import Run

STYLE = "body{font:16px/1.5 sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}\
table{border-collapse:collapse}td,th{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left}"


def page(runs: Sequence[Run], metric: str, pictures: Mapping[str, bytes], published: Sequence[Published]) -> str:
    """The report as HTML, its pictures inside.

    Args:
        runs: in the order of the table.
        metric: the column that was drawn.
        pictures: caption and PNG.
        published: whose sources are listed.
    """
    raw = raw_name(metric) if any(raw_name(metric) in run.series for run in runs) else None
    rows = "".join(_row(run, metric, raw) for run in runs)
    metrics = f"<th>{escape(metric)}, last</th>" + (f"<th>{escape(raw)}, last</th>" if raw else "")
    images = "".join(
        f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="data:image/png;base64,{b64encode(png).decode()}">'
        for caption, png in pictures.items()
    )
    sources = "".join(f"<li>{escape(curve.label)}: {escape(curve.source)}</li>" for curve in published)
    listed = (
        f"<h2>Published figures</h2><p>Hollow: not confirmed by a second source.</p><ul>{sources}</ul>"
        if sources
        else ""
    )
    notes = dict.fromkeys(c for run in runs if run.statement for c in run.statement.get("caveats", []))
    caveats = "".join(f"<li>{escape(str(note))}</li>" for note in notes)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Report of {len(runs)} runs</title><style>{STYLE}</style>'
        f"<h1>Report of {len(runs)} runs</h1><table><tr><th>run</th>{metrics}<th>ε ≤</th><th>δ</th>"
        f"<th>μ ≤</th><th>right ≤, if wrong 0.1 %</th><th>σ</th><th>q</th><th>steps</th></tr>{rows}</table>{images}{listed}"
        + (f"<h2>Caveats of the runs</h2><ul>{caveats}</ul>" if caveats else "")
        + "</html>\n"
    )


def _risk(risk: Mapping[str, Any] | None) -> list[str]:
    """μ, and TPR at a false positive rate of 0.1 %, of a statement that has them."""
    if not risk:
        return ["", ""]
    return [round_up(float(risk["mu"])), percent(float(risk["tpr_at_fpr"]["0.001"]))]


def _row(run: Run, metric: str, raw: str | None) -> str:
    name = f"{run.name} (SIMULATION, not private)" if run.is_simulation else run.name
    cells = [name, f"{run.series[metric][-1][1]:.4f}"]
    if raw is not None:
        cells.append(f"{run.series[raw][-1][1]:.4f}" if raw in run.series else "")
    if run.statement is None:
        cells += ["∞ (no privacy)" if math.isinf(run.epsilon) else UNKNOWN, "", "", "", "", "", ""]
    else:
        spent = run.statement
        cells += [round_up(run.epsilon), f"{spent['delta']:g}", *_risk(spent.get("risk"))]
        cells += [f"{spent.get(key, ''):.4g}" for key in ("noise_multiplier", "sampling_probability", "steps")]
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
