"""Trainings in processes of their own that may be killed, and a list of everything that they released.

A process is forked from the warm test process, so that a life costs a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dp.mechanism.gaussian as gaussian_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism.randomness import Stream
from tests.conftest import PATIENCE, loader, regression_data, regressor, trainer

RELEASES = "releases.jsonl"


def fork(life: Callable[[], None], folder: Path) -> int:
    """Run ``life`` in a child process, with what it prints in ``folder/life.log``; the child's id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of forking beside threads: torch runs with one here
        child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / "life.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 (open until the process ends)
        os.chdir(folder)
        warnings.simplefilter("ignore")
        life()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int, *, kill_after: float | None = None, send: int = signal.SIGKILL, within: float = PATIENCE) -> int:
    """The child's exit code (negative for a signal), after sending it a signal if it lives that long."""
    started, sent = time.monotonic(), False
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        passed = time.monotonic() - started
        if kill_after is not None and not sent and passed >= kill_after:
            os.kill(child, send)
            sent = True
        if passed > within:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the process of a training was still there after {within} s")
        time.sleep(0.002)


def record_releases(folder: Path) -> None:
    """From now on, append to a file what every release of this process was: its step, noise, and gradient before it."""
    original = gaussian_module.add_gaussian_noise
    descriptor = os.open(folder / RELEASES, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(parts: Any, coordinates: int, *, noise_std: float, key: Any, step: int) -> None:
        ((_, total),) = parts  # of one process
        line = {
            "step": step,
            "noise": key.derive(Stream.NOISE, step).hex(),
            "sum": hashlib.sha256(total.numpy().tobytes()).hexdigest(),
            "noise_std": noise_std,
        }
        original(parts, coordinates, noise_std=noise_std, key=key, step=step)
        os.write(descriptor, (json.dumps(line) + "\n").encode())

    gaussian_module.add_gaussian_noise = add


def releases(folder: Path) -> list[dict[str, Any]]:
    """Everything that all processes so far have released."""
    file = folder / RELEASES
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "ckpt").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)


def life(
    folder: Path, ckpt: Path | None = None, *callbacks: L.Callback, steps: int = 12, module: Any = None, **options: Any
) -> DifferentialPrivacy:
    """One fit with a checkpoint after every step, resumed from ``ckpt``."""
    private = DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})
    saver = ModelCheckpoint(folder / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit = trainer(private, *callbacks, saver, max_steps=steps, enable_checkpointing=True, default_root_dir=folder)
    fit.fit(regressor(lr=0.1) if module is None else module, loader(regression_data()), ckpt_path=ckpt)
    return private


def killed_life(folder: Path, ckpt: Path | None, *, kill_after: float, **options: Any) -> int:
    """A life that gets ``kill -9`` after so many seconds, unless it is quicker; its exit code."""

    def run() -> None:
        record_releases(folder)
        life(folder, ckpt, **options)

    return wait(fork(run, folder), kill_after=kill_after)


class StopAt(L.Callback):
    """Does something to its own process once so many steps of this fit are done (before the checkpoint of the last)."""

    def __init__(self, step: int, act: Callable[[L.Trainer], None]) -> None:
        self.step = step
        self.act = act

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.act(trainer)


def kill_itself(_: Any = None) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
