"""A recipe trained in turns of some minutes, from checkpoint to checkpoint, for ``benchmarks/gpu.py``."""

from __future__ import annotations

import csv
import json
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from gpu_slices import ROOT, Found
from lightning.pytorch.callbacks import ModelCheckpoint, Timer

from lightning_dp.cli.recipes import RecipeCLI, command_line
from lightning_dp.strategy import register_strategies


def train(
    recipe: str, words: tuple[str, ...] = (), start: float = 60.0
) -> Callable[[torch.device, float, Path], Found]:
    """A turn of a recipe: at most the seconds left less ``start`` for imports, data and looks, and then a checkpoint.

    Args:
        recipe: a file of ``recipes/``.
        words: further options.
        start: seconds.
    """

    def work(device: torch.device, seconds: float, folder: Path) -> Found:
        here = folder / Path(recipe).stem
        here.mkdir(parents=True, exist_ok=True)
        checkpoint = here / "turn.ckpt"
        options = [
            "--config",
            str(ROOT / recipe),
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.accelerator",
            device.type,
        ]
        options += ["--trainer.enable_checkpointing", "false", "--trainer.logger.init_args.save_dir", str(here), *words]
        register_strategies()
        before = Path.cwd()
        os.chdir(here)
        try:
            with command_line(options):
                cli = RecipeCLI(run=False, save_config_callback=None)
            planned = cli.trainer.max_steps
            began, before_that = _so_far(checkpoint)
            timer = Timer(
                timedelta(seconds=before_that + max(1.0, seconds - start))
            )  # it counts what earlier turns took
            saving = ModelCheckpoint(here, filename="turn", enable_version_counter=False, save_on_train_epoch_end=True)
            cli.trainer.callbacks += [timer, saving]
            clock = time.monotonic()
            cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=str(checkpoint) if began else None)
        finally:
            os.chdir(before)
        steps = cli.trainer.global_step
        found: Found = {
            "recipe": recipe,
            "steps": steps,
            "of": planned,
            "turn": [began, steps, time.monotonic() - clock],
        }
        if steps < planned:
            return {**found, "state": "again"}
        statement = json.loads(max(here.rglob("privacy*.json"), key=lambda one: one.stat().st_mtime).read_text("utf-8"))
        return {**found, "accuracy": _last_accuracy(here), "epsilon": statement["epsilon"], "delta": statement["delta"]}

    return work


def _so_far(checkpoint: Path) -> tuple[int, float]:
    """Steps and seconds of the turns before."""
    if not checkpoint.is_file():
        return 0, 0.0
    saved = torch.load(checkpoint, map_location="cpu", weights_only=False)
    timers = [state for name, state in saved["callbacks"].items() if name.startswith("Timer")]
    return int(saved["global_step"]), float(timers[0]["time_elapsed"]["train"])


def _last_accuracy(folder: Path) -> float:
    found: list[tuple[int, float]] = []
    for metrics in folder.rglob("metrics.csv"):
        with metrics.open(encoding="utf-8", newline="") as file:
            found += [
                (int(row["step"]), float(row["val/accuracy"]))
                for row in csv.DictReader(file)
                if row.get("val/accuracy")
            ]
    return max(found)[1]
