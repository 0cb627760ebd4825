"""The files under recipes/launch: what they start is a recipe on several machines, and nothing else."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.distributed.run import get_args_parser

from lightning_dp import DifferentialPrivacy, PrivateDDPStrategy
from lightning_dp.cli.recipes import RecipeCLI
from tests.conftest import PATIENCE
from tests.ranks.cluster import free_port

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes" / "launch"
RECIPE = "recipes/digits/cnn_eps8.yaml"


def command(file: str, start: str) -> list[str]:
    """The words of the one command that the file ends with, and of what comes after ``start`` in it."""
    lines = (LAUNCH / file).read_text(encoding="utf-8").split("exec ")[1].replace("\\\n", " ")
    words = [re.sub(r'^"|"$', "", word) for word in lines.split()]
    return words[words.index(start) + 1 :]


@pytest.mark.parametrize("file", ["torchrun.sh", "slurm.sbatch"])
def test_both_files_are_bash_and_start_the_same_program(file: str) -> None:
    subprocess.run(["bash", "-n", str(LAUNCH / file)], check=True)
    own = command(file, "lightning_dp")
    assert own[:4] == ["fit", "$@", "--config", "recipes/launch/cluster.yaml"]
    assert own[4::2] == ["--trainer.num_nodes", "--trainer.devices", "--ckpt_path"]
    assert own[-1] == "last"


def test_torchrun_knows_the_words_it_is_given() -> None:
    given = [
        "2" if word in ("$NODES", "$DEVICES", "$RESTARTS") else word for word in command("torchrun.sh", "torchrun")
    ]
    parsed = get_args_parser().parse_args(given)
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts, parsed.rdzv_backend) == ("2", "2", 2, "c10d")
    assert parsed.module
    assert parsed.training_script == "lightning_dp"


def test_a_recipe_with_the_cluster_file_is_the_recipe_with_ddp_and_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", RECIPE, "--config", "recipes/launch/cluster.yaml", "--trainer.accelerator", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lightning-dp", *words])
    trainer: Any = RecipeCLI(run=False, save_config_callback=None).trainer
    assert isinstance(trainer.strategy, PrivateDDPStrategy)
    assert trainer.strategy._timeout == timedelta(minutes=10)
    (saved,) = (callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint))
    assert saved.save_last
    (private,) = (callback for callback in trainer.callbacks if isinstance(callback, DifferentialPrivacy))
    assert private.epsilon == 8.0


def trained(file: str, folder: Path, steps: int, **told: str) -> str:
    """Start the file with a recipe, two processes in all, and give what it has said."""
    (folder / "recipes").unlink(missing_ok=True)
    (folder / "recipes").symlink_to(ROOT / "recipes")
    words = ["--config", RECIPE, "--data.batch_size", "256", "--trainer.accelerator", "cpu"]
    words += ["--trainer.max_steps", str(steps), "--trainer.logger.init_args.save_dir", str(folder)]
    path = f"{folder}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", LAUNCH / file, *words],
        cwd=folder, env={**os.environ, "PATH": path, **told}, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.nightly
@pytest.mark.timeout(3 * PATIENCE)
def test_torchrun_trains_a_recipe_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The file itself, with two processes. Started again, it finds its checkpoint, and that the budget is spent."""
    for steps in (3, 6):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            main = f"127.0.0.1:{probe.getsockname()[1]}"
        said = trained("torchrun.sh", tmp_path, steps, MAIN=main, DEVICES="2")
        assert "3 steps, PRV accountant" in said
    assert "Restored all states from the checkpoint" in said
    assert "The privacy budget is spent" in said


SRUN = """#!{python}
# Stands in for srun: starts each task of the job with what SLURM would tell it, and ends all if one fails.
import os, subprocess, sys
options = [word for word in sys.argv[1:] if word.startswith("--")]
command = sys.argv[1 + options.index("--kill-on-bad-exit=1") + 1 :]
per_node = int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = [
    subprocess.Popen(command, env={{
        **os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task % per_node),
        "SLURM_NODEID": str(task // per_node), "SLURM_STEP_ID": "0",
    }})
    for task in range(int(os.environ["SLURM_NTASKS"]))
]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.nightly
@pytest.mark.timeout(3 * PATIENCE)
def test_slurm_trains_a_recipe_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The file itself, as two nodes with a task each; only ``srun`` is ours, for this is no cluster."""
    srun = tmp_path / "srun"
    srun.write_text(SRUN.format(python=sys.executable))
    srun.chmod(0o755)
    for steps in (3, 6):
        job = {
            "SLURM_JOB_ID": str(770000 + free_port() - 15000), "SLURM_JOB_NAME": "private", "SLURM_NNODES": "2",
            "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1,host2",
        }  # fmt: skip
        said = trained("slurm.sbatch", tmp_path, steps, **job)
        assert "3 steps, PRV accountant" in said
    assert "MEMBER: 2/2" in said
    assert "Restored all states from the checkpoint" in said
    assert "The privacy budget is spent" in said
