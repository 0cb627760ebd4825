"""One HTML page that needs no other file."""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from lightning_dp.accounting.risk import percent, round_up
from lightning_dp.callbacks.raw_validation import raw_name
from lightning_dp.reporting.facts import Published
from lightning_dp.reporting.figures import UNKNOWN
from lightning_dp.reporting.runs import Run

STYLE = """
:root{color-scheme:light}
body{font:16px/1.55 system-ui,sans-serif;color:#1d2733;max-width:60rem;margin:2.5rem auto;padding:0 1.2rem}
h1{font-size:1.7rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.4rem}.made{color:#5a6775;margin-top:0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .8rem .35rem 0;border-bottom:1px solid #dde3e9;text-align:left;vertical-align:top}
th{color:#5a6775;font-weight:600}tbody th{color:#1d2733;min-width:7rem;overflow-wrap:break-word}
td{min-width:4rem;max-width:18rem;overflow-wrap:break-word}
.meaning{background:#f3f6f9;border-left:4px solid #0072b2;padding:.7rem 1.1rem;margin:1.4rem 0}
figure{margin:1rem 0}img{max-width:100%;height:auto}figcaption{color:#5a6775}
code{font-size:.9em;overflow-wrap:anywhere}
"""

MEANING = (
    "<b>ε</b> bounds how much the data of one {unit} can have changed what was released: whatever is seen is at most "
    "e<sup>ε</sup> times as likely with it as without, but for a part of probability <b>δ</b>. Less ε is more privacy. "
    "<b>Risk</b> says the same as a test: somebody who sees all that was released, and is wrong about 0.1 % of those who were "
    "not in the data, is right about at most so many of those who were. A metric computed on the same people's data is not "
    "covered by ε."
)

READ = {
    "accuracy": "The last value of each run, at the ε that it spent. Up and to the left is better. A dashed line is a run "
    "without privacy, a dotted one a run whose ε is not known, a cross a simulation. The vertical axis does not begin at 0.",
    "budget": "ε after each step that was logged, an upper bound; the dotted lines are the budgets.",
    "validation": "Each validation. Solid: on averaged weights; dashed: on the weights as trained.",
}


def page(
    runs: Sequence[Run],
    metric: str,
    pictures: Mapping[str, tuple[str, bytes]],
    published: Sequence[Published],
    made: str = "",
) -> str:
    """The report as HTML, its pictures inside.

    Args:
        runs: in the order of the table.
        metric: the column that was drawn.
        pictures: which one (of :data:`READ`) → caption and PNG.
        published: whose sources are listed.
        made: when, and by what.
    """
    raw = raw_name(metric) if any(raw_name(metric) in run.series for run in runs) else None
    title = runs[0].label if len(runs) == 1 else f"Report of {len(runs)} runs"
    units = dict.fromkeys(str(run.statement.get("unit", "example")) for run in runs if run.statement)
    meaning = MEANING.format(unit=escape(" or ".join(units) or "example"))
    return "".join(
        (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<style>{STYLE}</style></head><body><main><h1>{escape(title)}</h1>",
            f'<p class="made">{escape(made)}</p>',
            _table(
                "Results", ["run", *filter(None, (metric, raw)), *_SPENT], (_row_of(run, metric, raw) for run in runs)
            ),
            f'<div class="meaning">{meaning}</div>' if units else "",
            *(_figure(READ[name], caption, png) for name, (caption, png) in pictures.items()),
            _table("How they were trained", ["", *(run.label for run in runs)], _settings(runs)),
            _list("Published figures", "Hollow: not confirmed by a second source.", _sources(published)),
            _list("Caveats of the runs", "", _caveats(runs)),
            "</main></body></html>\n",
        )
    )


_SPENT = ("ε ≤", "δ", "risk ≤", "spent")


def _row_of(run: Run, metric: str, raw: str | None) -> list[str]:
    name = f"{run.label} (SIMULATION, not private)" if run.is_simulation else run.label
    cells = [name, f"{run.series[metric][-1][1]:.4f}"]
    if raw is not None:
        cells.append(f"{run.series[raw][-1][1]:.4f}" if raw in run.series else "")
    spent = run.statement
    if spent is None:
        return [*cells, "∞ (no privacy)" if math.isinf(run.epsilon) else UNKNOWN, "", "", ""]
    state = {"ended": "to the end", "interrupted": "until it was interrupted", "running": "an upper bound: not ended"}
    return [
        *cells,
        round_up(run.epsilon),
        f"{spent['delta']:g}",
        "" if run.is_simulation else _risk(spent.get("risk")),
        state.get(str(spent.get("state")), "not known"),
    ]


def _risk(risk: Mapping[str, Any] | None) -> str:
    """TPR at a false positive rate of 0.1 %, of a statement that has it."""
    return f"{percent(float(risk['tpr_at_fpr']['0.001']))} of those who were there" if risk else ""


def _settings(runs: Sequence[Run]) -> Iterable[list[str]]:
    """One row for each fact that a run has, and a cell for each run."""
    facts = [_facts(run) for run in runs]
    for name in dict.fromkeys(name for one in facts for name in one):
        yield [
            name,
            *(
                one.get(name, "not known" if run.private is not False else "–")
                for one, run in zip(facts, runs, strict=True)
            ),
        ]


def _facts(run: Run) -> dict[str, str]:
    spent = run.statement or {}
    about = spent.get("run") or {}
    numbers = {
        "examples N": f"{run.size:,}" if run.size is not None else None,
        "expected batch B": _number(spent.get("expected_batch_size")),
        "sampling probability q": _number(spent.get("sampling_probability")),
        "sampling": spent.get("sampling"),
        "private steps": _number(spent.get("steps")),
        "noise multiplier σ": _number(spent.get("noise_multiplier")),
        "clip norm C": _number(spent.get("clip_norm")),
        "clipping": spent.get("clipping"),
        "protects": spent.get("neighbouring_relation"),
        "μ of Gaussian DP ≤": round_up(float(spent["risk"]["mu"])) if spent.get("risk") else None,
        "accountant": spent.get("accountant"),
        "randomness": spent.get("randomness"),
        "model": (about.get("module") or {}).get("class"),
        "begun": str(about["begun"]).replace("T", " ").replace("+00:00", " UTC") if about.get("begun") else None,
        "versions": _versions(spent.get("version"), about.get("versions") or {}),
    }
    found = {name: str(fact) for name, fact in numbers.items() if fact is not None}
    last = {"read from": f"{run.name} ({run.logger})"}
    return {"data set": run.data or "not known", "privacy": _privacy(run), **found, **last}


def _privacy(run: Run) -> str:
    if run.statement is not None:
        return "a simulation, not private" if run.is_simulation else "DP-SGD"
    return {True: "private; how much it spent is not known", False: "none", None: "not known"}[run.private]


def _number(value: Any) -> str | None:
    return (
        None
        if value is None
        else f"{value:.4g}"
        if isinstance(value, float) and value != int(value)
        else f"{value:,.0f}"
    )


def _versions(own: Any, others: Mapping[str, Any]) -> str | None:
    found = {"lightning_dp": own, **{name: others.get(name) for name in ("torch", "lightning", "python")}}
    return ", ".join(f"{name} {one}" for name, one in found.items() if one) or None


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(
        f"<tr><th>{escape(first)}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in rest)}</tr>"
        for first, *rest in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{escape(caption)}</h2><div class="wide">{table}</div>'


def _figure(said: str, caption: str, png: bytes) -> str:
    source = f"data:image/png;base64,{b64encode(png).decode()}"
    return (
        f'<h2>{escape(caption)}</h2><figure><img alt="{escape(caption)}" src="{source}">'
        f"<figcaption>{escape(said)}</figcaption></figure>"
    )


def _list(caption: str, said: str, entries: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(entry)}</li>" for entry in entries)
    return f"<h2>{escape(caption)}</h2>{f'<p>{escape(said)}</p>' if said else ''}<ul>{items}</ul>" if items else ""


def _sources(published: Sequence[Published]) -> Iterable[str]:
    return (f"{curve.label}: {curve.source}" for curve in published)


def _caveats(runs: Sequence[Run]) -> Iterable[str]:
    return dict.fromkeys(str(note) for run in runs if run.statement for note in run.statement.get("caveats", []))
