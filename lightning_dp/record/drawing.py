"""How this package draws: one kind of figure, colours that everybody can tell apart, no display and no global state."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Of Okabe and Ito."""


def draw(on: Callable[[Any], None], *, title: str = "") -> Any:
    """A ``matplotlib`` figure of one pair of axes.

    Args:
        on: draws on the axes.
        title: above them.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = import_module("matplotlib.figure").Figure(figsize=(8, 5), layout="constrained")  # pyplot has global state
    axes = figure.add_subplot()
    on(axes)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if title:
        axes.set_title(title, fontsize="medium")
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize="small")
    return figure
