"""How tight the audit is: the digits recipe trained with canaries at several ε, each in a run of its own.

uv run python benchmarks/audit.py --epsilons 1 4 8 --canaries 40000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

RECIPE = Path(__file__).parents[1] / "recipes" / "digits" / "cnn_eps8.yaml"


def recipe_at(epsilon: float, folder: Path) -> Path:
    """The digits recipe with another target ε."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for callback in recipe["trainer"]["callbacks"]:
        if callback["class_path"] == "lightning_dp.DifferentialPrivacy":
            callback["init_args"]["epsilon"] = epsilon
    path = folder / f"eps{epsilon:g}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def main() -> None:
    """Print one row for each ε and seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--canaries", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for epsilon in args.epsilons:
            for seed in args.seeds:
                words = ["audit", "--config", str(recipe_at(epsilon, Path(folder))), "--json", f"--seed={seed}"]
                words += [f"--gradient-canaries={args.canaries}", "--input-canaries=0"]
                command = [sys.executable, "-m", "lightning_dp", *words]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                (attack,) = found["attacks"]
                print(
                    f"claimed {found['epsilon_claimed']:.3f}  lower {found['epsilon_lower']:.3f}  ratio "
                    f"{found['epsilon_lower'] / found['epsilon_claimed']:.2f}  seed {seed}  plan p "
                    f"{found['plan_p_value']:.2g}  {attack['correct']} of {attack['guesses']} guesses right",
                    flush=True,
                )


if __name__ == "__main__":
    main()
