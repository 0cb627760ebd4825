"""Measure the CIFAR-10 (JPEG) recipes for a CPU: several seeds, through the command line a user would type.

    LIGHTNING_DP_DATA=folder/of/cifar10-jpeg.tar.xz uv run python benchmarks/cifar10_cpu.py --seeds 3 --results runs.jsonl

One run after the other. Each is a process of its own whose seconds include start-up, the search for σ and validation, and,
for the first one on a machine, the computing of the features. A line of JSON is appended to the results for each; a run that
is already there is not made again, so an interrupted measurement goes on where it stopped. A seed fixes the initial weights
only: sampling and noise are secret and differ from run to run. Prints a Markdown table: mean and sample standard deviation.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def run_recipe(name: str, seed: int, more: list[str]) -> dict[str, Any]:
    """Run a recipe in a fresh process and an empty folder, and return what it wrote there.

    Args:
        name: of a file in ``recipes/cifar10``, without ``.yaml``.
        seed: the ``seed_everything`` of the run.
        more: further words of the command line.

    Raises:
        RuntimeError: the process failed; its output is in the message.
    """
    words = ["--config", str(RECIPES / "cifar10" / f"{name}.yaml")]
    words += ["--seed_everything", str(seed), "--trainer.enable_progress_bar", "false", *more]
    with tempfile.TemporaryDirectory() as folder:
        started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "lightning_dp", "fit", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds, then = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
        (metrics,) = Path(folder).rglob("metrics.csv")
        with metrics.open(encoding="utf-8", newline="") as file:
            accuracies = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
        found = [*Path(folder).rglob("privacy.json")]
        spent = json.loads(found[0].read_text(encoding="utf-8")) if found else {}  # without privacy there is none
    return {
        "recipe": name,
        "seed": seed,
        "more": more,
        "accuracy": accuracies[-1],
        "curve": accuracies,
        "epsilon": spent.get("epsilon"),
        "noise_multiplier": spent.get("noise_multiplier"),
        "simulation": spent.get("simulation"),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(then.ru_utime - used.ru_utime + then.ru_stime - used.ru_stime, 1),
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def table(results: list[dict[str, Any]]) -> str:
    """The Markdown table of all results that are no simulations."""
    rows = [
        "| recipe | seeds | val/accuracy, % | worst | ε | σ | seconds | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(result["recipe"] for result in results):
        runs = [result for result in results if result["recipe"] == name and not result["more"]]
        if not runs:
            continue
        accuracies = [100 * run["accuracy"] for run in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        cells = [
            name,
            ", ".join(str(run["seed"]) for run in runs),
            f"{statistics.mean(accuracies):.2f}{spread}",
            f"{min(accuracies):.2f}",
            f"{max(run['epsilon'] or math.inf for run in runs):.4f}",
            f"{max(run['noise_multiplier'] or 0 for run in runs):.3f}",
            f"{statistics.mean(run['seconds'] for run in runs):.0f}",
            f"{statistics.mean(run['cpu_seconds'] for run in runs):.0f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Run what the command line asks for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. SEEDS-1 for each recipe (default 3)")
    parser.add_argument("--recipes", nargs="+", default=["cnn_eps3", "cnn_eps7.5"], help="files in recipes/cifar10")
    parser.add_argument("--results", type=Path, required=True, help="file to which a line is appended for each run")
    arguments, more = parser.parse_known_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds}: expected at least 1.")
    results: list[dict[str, Any]] = []
    if arguments.results.exists():
        results = [json.loads(line) for line in arguments.results.read_text(encoding="utf-8").splitlines()]
    for seed in range(arguments.seeds):
        for name in arguments.recipes:
            if any((r["recipe"], r["seed"], r["more"]) == (name, seed, more) for r in results):
                continue
            results.append(run_recipe(name, seed, more))
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1], ensure_ascii=False) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
