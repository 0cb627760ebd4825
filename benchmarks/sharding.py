"""What each of two ranks holds, with DDP and with sharded parameters, between the steps and at most.

MALLOC_MMAP_THRESHOLD_=1000000 uv run python benchmarks/sharding.py [--width 2000] [--layers 4] [--ranks 2]

Trains a stack of linear layers with Adam for four steps on random data, under ``ddp`` and both kinds of ``private_fsdp``,
with gloo on the CPU. Memory is the operating system's (resident set), of rank 0, above what the process had before the module
existed, in the steps after the first; in units of one copy of the parameters. The variable makes the C library give freed
tensors back at once.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy, PrivateModelParallelStrategy

STRATEGIES: dict[str, Callable[[int], Any]] = {
    "ddp": lambda ranks: "ddp",
    "private_fsdp": lambda ranks: "private_fsdp",
    'private_fsdp, gather="layer"': lambda ranks: PrivateModelParallelStrategy(ranks, gather="layer"),
}


class Stack(L.LightningModule):
    """Linear layers; each is sharded on its own where there is a device mesh."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.width, self.layers, self.net = width, layers, None
        self.between: list[float] = []
        self.start = 0.0

    def configure_model(self) -> None:
        """One layer after the other, so that no rank ever holds all of them at rest."""
        if self.net is None:
            self.net = nn.Sequential()
            for _ in range(self.layers):
                layer = nn.Linear(self.width, self.width)
                self.net.append(
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"]) if self.device_mesh else layer
                )
            if self.device_mesh:
                fully_shard(self.net, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """A loss of no meaning."""
        return self.net(batch[0]).square().mean()

    def on_train_batch_end(self, *_: Any) -> None:
        """Note what is there between two steps, and forget the trial of the engine and the first step."""
        self.between.append(resident("VmRSS"))
        if len(self.between) == 1:
            self.start = resident("VmHWM")
            forget_peak()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam keeps two numbers for each parameter."""
        return torch.optim.Adam(self.parameters(), foreach=False)


def resident(field: str) -> float:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at most since the last :func:`forget_peak`."""
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024.0 * int(kilobytes)


def forget_peak() -> None:
    """Let ``VmHWM`` start again."""
    Path("/proc/self/clear_refs").write_text("5")


def rank(number: int, ranks: int, port: int, strategy: str, width: int, layers: int) -> None:
    """One process, as torchrun would start it."""
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark",
    )  # fmt: skip
    torch.set_num_threads(1)
    data = DataLoader(TensorDataset(torch.randn(64, width)), batch_size=2)
    trainer = L.Trainer(
        accelerator="cpu", devices=ranks, strategy=STRATEGIES[strategy](ranks), max_steps=4, logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[DifferentialPrivacy(noise_multiplier=1.0, physical_batch_size=1, engine="ghost")],
    )  # fmt: skip
    before = resident("VmRSS")
    module = Stack(width, layers)
    trainer.fit(module, data)
    if number == 0:
        copy = 4.0 * layers * (width**2 + width)
        between, peak = min(module.between[1:]) - before, resident("VmHWM") - before
        start = module.start - before
        row = f"| {strategy} | {between / copy:.1f} | {peak / copy:.1f} | {start / copy:.1f} |"
        print(row, file=sys.stderr, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=2)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    print("| strategy | between steps | at most, in a step | at most, before and in the first |", file=sys.stderr)
    for name in STRATEGIES:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            given = free.getsockname()[1]
        several = [
            get_context("fork").Process(
                target=rank, args=(number, arguments.ranks, given, name, arguments.width, arguments.layers)
            )
            for number in range(arguments.ranks)
        ]
        for process in several:
            process.start()
        for process in several:
            process.join()
