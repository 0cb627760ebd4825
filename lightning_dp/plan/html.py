"""A small table for notebooks, which looks right on a light page and on a dark one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_LEFT = "text-align:left;vertical-align:top;background:transparent;color:inherit"


def html_table(title: str, rows: Mapping[str, object], notes: Sequence[str] = ()) -> str:
    """A title, one row for each name and value, and a list below.

    Everything is escaped. No colour is set, so text and background are those of the page.

    Args:
        title: above the table.
        rows: name → value; numbers are shown to six digits, and rows whose value is ``None`` are left out.
        notes: sentences below the table.

    Example:
        >>> "<td style" in html_table("A plan", {"σ": 2.0}) and "&lt;b&gt;" in html_table("<b>", {})
        True
    """
    lines = "".join(
        f'<tr><th scope="row" style="{_LEFT};font-weight:600">{escape(name)}</th>'
        f'<td style="{_LEFT}">{escape(in_short(value))}</td></tr>'
        for name, value in rows.items()
        if value is not None
    )
    below = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return (
        f'<div style="max-width:60em"><p><strong>{escape(title)}</strong></p>'
        + (f'<table style="color:inherit"><tbody>{lines}</tbody></table>' if lines else "")
        + (f"<ul>{below}</ul>" if below else "")
        + "</div>"
    )


def in_short(value: object) -> str:
    """A number to six digits, ∞ as such, and anything else as its text.

    Example:
        >>> in_short(0.1234567), in_short(float("inf")), in_short(4096), in_short("flat")
        ('0.123457', '∞', '4096', 'flat')
    """
    if isinstance(value, float):
        return "∞" if math.isinf(value) else f"{value:.6g}"
    return str(value)
