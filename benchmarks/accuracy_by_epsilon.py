"""Draw the README's picture: accuracy on CIFAR-10 against ε, as measured with this package, beside published figures.

    uv run python benchmarks/accuracy_by_epsilon.py

reads ``benchmarks/accuracy_by_epsilon.csv``, one measured result a row with the command that gave it, and writes
``docs/accuracy_by_epsilon.svg``. A new result is a new row, and this command again. ``epsilon`` is ``inf`` without privacy, and
``deviation`` the sample standard deviation over ``seeds`` runs, empty for one run. Published figures are those of
``lightning_dp/reporting/facts.py``, with their sources.
"""

from __future__ import annotations

import argparse
import csv
import math
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_dp.record.drawing import COLOURS, draw
from lightning_dp.reporting.facts import TASKS, Published

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "benchmarks" / "accuracy_by_epsilon.csv"
PICTURE = ROOT / "docs" / "accuracy_by_epsilon.svg"
MARKERS, GREYS = "osDv^P", ("#8a8a8a", "#555555", "#333333", "#aaaaaa")


@dataclass(frozen=True)
class Result:
    """One measured result; accuracy and deviation in per cent."""

    kind: str
    epsilon: float
    accuracy: float
    deviation: float
    seeds: int
    command: str

    @property
    def mark(self) -> str:
        """Of what stands for it in the picture."""
        return f"measured {self.kind} {self.epsilon:g} {self.accuracy:g} {self.seeds}".replace(" ", "-")


def results(table: Path = TABLE) -> list[Result]:
    """The rows of the table."""
    with table.open(encoding="utf-8", newline="") as lines:
        return [
            Result(
                row["kind"],
                float(row["epsilon"]),
                float(row["accuracy"]),
                float(row["deviation"] or "nan"),
                int(row["seeds"]),
                row["command"],
            )
            for row in csv.DictReader(lines)
        ]


def published() -> list[Published]:
    """Published curves on CIFAR-10, from scratch and fine-tuned."""
    return [*TASKS["cifar10"].curves, *TASKS["cifar10-finetuning"].curves]


def picture(measured: list[Result], to: Path) -> None:
    """Draw all of ``measured`` and of what is published."""

    def on(axes: Any) -> None:
        for place, curve in enumerate(published()):
            colour, marker = GREYS[place % len(GREYS)], "s^Do"[place % 4]
            axes.plot(*_columns(curve), "-", color=colour, lw=1, zorder=1)
            for epsilon, accuracy in curve.points:
                face = "white" if epsilon in curve.unconfirmed else colour
                axes.plot(epsilon, 100 * accuracy, marker, color=colour, mfc=face, ms=5, zorder=2)
            line = "-" if len(curve.points) > 1 else ""
            axes.plot([], [], marker + line, color=colour, ms=5, label=curve.label.replace("best", "from scratch"))
        axes.plot([], [], "s", color=GREYS[0], mfc="white", ms=5, label="hollow: without a second source")
        for place, kind in enumerate(dict.fromkeys(one.kind for one in measured)):
            colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
            size = max(11 - 2 * place, 5)  # of two that fall together both are seen
            of_kind = sorted((one for one in measured if one.kind == kind), key=lambda one: one.epsilon)
            private = [one for one in of_kind if math.isfinite(one.epsilon)]
            axes.plot([one.epsilon for one in private], [one.accuracy for one in private], "-", color=colour, lw=2)
            for one in of_kind:
                if one not in private:
                    axes.axhline(one.accuracy, ls="--", lw=1.5, color=colour, gid=one.mark)
                    axes.annotate(
                        f"{one.accuracy:.1f} without privacy",
                        (0.01, one.accuracy),
                        (0, 3),
                        xycoords=("axes fraction", "data"),
                        textcoords="offset points",
                        color=colour,
                        fontsize="small",
                    )
                    continue
                bar = None if math.isnan(one.deviation) else one.deviation
                axes.errorbar(one.epsilon, one.accuracy, bar, color=colour, capsize=3)
                axes.plot(one.epsilon, one.accuracy, marker, color=colour, mec="white", ms=size, zorder=3, gid=one.mark)
            seeds = sorted({one.seeds for one in of_kind})
            runs = "one run" if seeds == [1] else f"{'-'.join(map(str, seeds))} runs"
            axes.plot([], [], marker + "-", color=colour, mec="white", ms=size, lw=2, label=f"{kind}, {runs}")
        ticker = import_module("matplotlib.ticker")
        axes.set(xscale="log", xlabel="ε at δ = 1e-5: less is more private", ylabel="accuracy on test images, %")
        axes.xaxis.set_major_locator(ticker.FixedLocator([0.1, 0.2, 0.5, 1, 2, 4, 8]))
        axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda epsilon, _: f"{epsilon:g}"))
        axes.xaxis.set_minor_locator(ticker.NullLocator())

    matplotlib = import_module("matplotlib")
    with matplotlib.rc_context({"svg.hashsalt": "lightning_dp", "svg.fonttype": "path", "font.size": 11}):
        figure = draw(on, title="CIFAR-10 under differential privacy")
        figure.set_size_inches(8, 5.5)
        _two_legends(figure, len({one.kind for one in measured}))
        figure.savefig(to, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")


def _two_legends(figure: Any, of_ours: int) -> None:
    """What was measured on the left, and what is published on the right, in the place of one list."""
    figure.legends[0].remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    for title, part, where in (
        ("measured here, on the JPEG copy", slice(-of_ours, None), "outside lower left"),
        ("published, on CIFAR-10 itself", slice(-of_ours), "outside lower right"),
    ):
        figure.legend(
            handles[part], labels[part], title=title, loc=where, alignment="left", frameon=False, fontsize="small"
        )


def _columns(curve: Published) -> tuple[list[float], list[float]]:
    return [epsilon for epsilon, _ in curve.points], [100 * accuracy for _, accuracy in curve.points]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--out", type=Path, default=PICTURE)
    words = parser.parse_args()
    picture(results(words.table), words.out)
    print(words.out)
