"""How tight the audit is, how often a right run is called wrong, and how many canaries find a bug.

uv run python benchmarks/audit.py --epsilons 1 4 8 --canaries 40000        # the digits recipe with canaries, a run for each ε
uv run python benchmarks/audit.py --honest 200 --out honest.jsonl          # right runs of a small model; goes on where it was
uv run python benchmarks/audit.py --planted --out planted.jsonl            # the planted bugs of tests/audit; likewise

What is no option of this script overrides the recipe, as in --model.width=4.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

RECIPE = Path(__file__).parents[1] / "recipes" / "digits" / "cnn_eps8.yaml"
BOUNDS = ("epsilon_delta", "curve", "gaussian_pair", "plan_law")


def recipe_at(epsilon: float, folder: Path) -> Path:
    """The digits recipe with another target ε."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    for callback in recipe["trainer"]["callbacks"]:
        if callback["class_path"] == "lightning_dp.DifferentialPrivacy":
            callback["init_args"]["epsilon"] = epsilon
    path = folder / f"eps{epsilon:g}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def tightness(epsilons: Sequence[float], canaries: int, seeds: Sequence[int], rest: Sequence[str]) -> None:
    """Print one row for each ε and seed."""
    with tempfile.TemporaryDirectory() as folder:
        for epsilon in epsilons:
            for seed in seeds:
                words = ["audit", "--config", str(recipe_at(epsilon, Path(folder))), "--json", f"--seed={seed}"]
                words += [f"--gradient-canaries={canaries}", "--input-canaries=0", *rest]
                command = [sys.executable, "-m", "lightning_dp", *words]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode not in (0, 1) or not done.stdout.strip():  # 1: the verdict is "violated"
                    sys.exit(done.stderr)
                found = json.loads(done.stdout.splitlines()[-1])
                (attack,), claimed = found["attacks"], found["epsilon_claimed"]
                row = "  ".join(
                    f"{one['name']} {one['epsilon']:.3f} ({one['epsilon'] / claimed:.2f})"
                    for one in found["bounds"]
                    if one["epsilon"] is not None
                )
                print(
                    f"{found['verdict']}  claimed {claimed:.3f}  {row}  seed {seed}  plan p {found['plan_p_value']:.2g}  "
                    f"{attack['correct']} of {attack['guesses']} guesses right",
                    flush=True,
                )


def honest(runs: int, out: Path, canaries: int = 600, steps: int = 24) -> None:
    """Audit right runs, one after the other, and count in how many a bound lies above the claim."""
    import lightning as L

    from lightning_dp import DifferentialPrivacy
    from lightning_dp.audit import audit

    class Small(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(4, 1)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.mse_loss(self.net(batch[0]).squeeze(-1), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    done = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
    for seed in range(len(done), runs):
        private = DifferentialPrivacy(epsilon=[1.0, 4.0, 8.0][seed % 3], delta=1e-5, engine="vmap")
        data = DataLoader(TensorDataset(torch.randn(64, 4), torch.randn(64)), batch_size=16)
        trainer = L.Trainer(
            max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[private],
        )  # fmt: skip
        found = audit(trainer, Small(), data, gradient_canaries=canaries, input_canaries=0, seed=seed)
        row = {"claimed": found.epsilon_claimed, "verdict": found.verdict, "p": found.plan_p_value}
        row |= {name: found.bound(name) for name in BOUNDS}
        done.append(json.dumps(row))
        out.write_text("\n".join(done) + "\n", encoding="utf-8")
    rows = [json.loads(line) for line in done]
    print(f"{len(rows)} right runs, {sum(row['verdict'] != 'consistent' for row in rows)} called violated")
    for name in BOUNDS:
        given = [row for row in rows if row[name] is not None]
        above = sum(row[name] > row["claimed"] for row in given)
        likely = float(stats.binom.sf(above - 1, len(given), 0.05))
        print(f"{name}: above the claim in {above} of {len(given)}; p = {likely:.2g} if the share is at most 5 %")


def planted(epsilons: Sequence[float], out: Path) -> None:
    """For each planted bug the fewest canaries, of five numbers, with which three of three audits call it violated."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.audit.test_audit import FOUND, audited

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    done = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
    for bug, epsilon in [(bug, epsilon) for bug in FOUND for epsilon in epsilons]:
        if any((row["bug"], row["epsilon"]) == (bug, epsilon) for row in done):
            continue
        row = {"bug": bug, "epsilon": epsilon, "canaries": None}
        for canaries in (250, 1000, 3000, 10_000, 30_000):
            found = []
            for seed in range(3):
                began = time.process_time()
                with FOUND[bug]():
                    one = audited(epsilon, steps=4, gradient=canaries, inputs=0, seed=seed, clip_norm=4.0)
                found.append((one, time.process_time() - began))
                if one.verdict != "violated":
                    break
            if all(one.verdict == "violated" for one, _ in found):
                by_bound = all(one.epsilon_lower > one.epsilon_claimed for one, _ in found)
                p = max(1.0 if one.plan_p_value is None else one.plan_p_value for one, _ in found)
                row |= {"canaries": canaries, "seconds": min(s for _, s in found), "by_bound": by_bound, "p": p}
                break
        done.append(row)
        out.write_text("".join(json.dumps(row) + "\n" for row in done), encoding="utf-8")
        print(json.dumps(row), flush=True)


def main() -> None:
    """Do what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 4.0, 8.0])
    parser.add_argument("--canaries", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--honest", type=int, metavar="RUNS", help="how many right runs of a small model to audit")
    parser.add_argument("--planted", action="store_true", help="how many canaries each planted bug takes")
    parser.add_argument("--out", type=Path, default=Path("audits.jsonl"), help="what is kept of --honest and --planted")
    args, rest = parser.parse_known_args()
    if args.planted:
        planted(args.epsilons, args.out)
    elif args.honest is None:
        tightness(args.epsilons, args.canaries, args.seeds, rest)
    else:
        honest(args.honest, args.out)


if __name__ == "__main__":
    main()
