"""One of two gloo ranks dies or hangs in the middle of training: the other stops with an error, in time."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_dp import DifferentialPrivacy
from lightning_dp.record.journal import FILE_NAME
from tests.conftest import PATIENCE, loader, regressor, trainer, weights
from tests.faults.lives import StopAt, fork, kill_itself, wait

TIMEOUT = 30.0
"""Seconds that a rank waits for another."""


def rank(number: int, port: int, folder: Path, act: Callable[[L.Trainer], None]) -> Callable[[], None]:
    """A process as torchrun starts it. Rank 1 does ``act`` after its third step."""

    def run() -> None:
        os.environ.update(
            RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0",
            MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults",
        )  # fmt: skip
        module = regressor(lr=0.1)
        callbacks = [StopAt(3, act if number == 1 else lambda _: torch.save(weights(module), folder / "weights.pt"))]
        fit = trainer(
            *callbacks,
            DifferentialPrivacy(noise_multiplier=1.0, engine="vmap"),
            max_steps=50, devices=2, default_root_dir=folder,
            strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT)),
        )  # fmt: skip
        try:
            fit.fit(module, loader())
        except BaseException:
            assert torch.equal(weights(module), torch.load(folder / "weights.pt"))
            (folder / f"stopped-{number}").touch()
            raise

    return run


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_the_other_rank_stops_with_an_error_in_time(tmp_path: Path, way: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    act: Callable[[L.Trainer], None] = kill_itself if way == "dies" else (lambda _: time.sleep(PATIENCE))
    first, second = (fork(rank(number, port, tmp_path, act), tmp_path) for number in (0, 1))
    try:
        ended = wait(first, within=PATIENCE)
    finally:
        os.kill(second, signal.SIGKILL)
        assert wait(second) == -signal.SIGKILL
    log = (tmp_path / "life.log").read_text()
    assert ended == 1, log[-3000:]
    assert (tmp_path / "stopped-0").exists(), log[-3000:]  # with the weights of the third step: no part of the fourth
    assert "RuntimeError" in log
    for name in (FILE_NAME, "privacy.json"):
        assert json.loads((tmp_path / name).read_text())["steps"] == 4, name  # charged before the ranks' sums meet
