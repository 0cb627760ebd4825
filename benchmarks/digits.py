"""Measure the digits recipes: every recipe, several seeds, through the command line a user would type.

    uv run python benchmarks/digits.py --seeds 5

Each run is a process of its own in an empty folder, so its seconds include start-up, the search for σ and
validation. A seed fixes the initial weights; sampling and noise are secret and differ from run to run, so two private
runs with one seed differ too. Prints a Markdown table: mean and sample standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "digits"
PACKAGES = ("lightning-dp", "torch", "lightning", "prv-accountant", "scikit-learn", "numpy")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a recipe gave.

    Args:
        accuracy: the last ``val/accuracy``, in [0, 1].
        epsilon: ε spent, as in ``privacy.json``; ``None`` without privacy.
        noise_multiplier: σ; ``None`` without privacy.
        seconds: wall-clock time of the whole process.
    """

    accuracy: float
    epsilon: float | None
    noise_multiplier: float | None
    seconds: float


def run_recipe(recipe: Path, seed: int) -> Run:
    """Run ``recipe`` with ``seed`` in a fresh process and an empty folder.

    Args:
        recipe: a recipe's YAML file.
        seed: the ``seed_everything`` of the run.

    Returns:
        What the run wrote into its folder.

    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "lightning_dp",
            "fit",
            "--config",
            str(recipe),
            f"--seed_everything={seed}",
        ]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        (metrics,) = Path(folder).rglob("metrics.csv")
        with metrics.open(encoding="utf-8", newline="") as file:
            accuracies = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
        statements = list(Path(folder).rglob("privacy.json"))
        statement = json.loads(statements[0].read_text(encoding="utf-8")) if statements else {}
        return Run(accuracies[-1], statement.get("epsilon"), statement.get("noise_multiplier"), seconds)


def table_row(name: str, runs: list[Run]) -> str:
    """Return one row of the Markdown table for the runs of one recipe."""
    accuracies = [100 * run.accuracy for run in runs]
    spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
    epsilons = [run.epsilon for run in runs if run.epsilon is not None]
    sigmas = [run.noise_multiplier for run in runs if run.noise_multiplier is not None]
    cells = (
        name,
        f"{statistics.mean(accuracies):.2f}{spread}",
        f"{min(accuracies):.2f}",
        f"{max(epsilons):.4f}" if epsilons else "∞",
        f"{max(sigmas):.3f}" if sigmas else "–",
        f"{statistics.mean(run.seconds for run in runs):.1f}",
        f"{max(run.seconds for run in runs):.1f}",
    )
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 .. SEEDS-1 for each recipe (default 5)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["cnn_eps8", "cnn_eps2", "cnn_nonprivate"],
        help="names of files in recipes/digits, without .yaml",
    )
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds}: expected at least 1.")
    rows = []
    for name in arguments.recipes:
        runs = []
        for seed in range(arguments.seeds):
            runs.append(run_recipe(RECIPES / f"{name}.yaml", seed))
            print(f"{name} seed {seed}: {runs[-1]}", file=sys.stderr, flush=True)
        rows.append(table_row(name, runs))
    print("| recipe | val/accuracy, % | worst | ε at δ = 1e-5 | σ | mean seconds | longest |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    print(f"\n{arguments.seeds} seeds; {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")


if __name__ == "__main__":
    main()
