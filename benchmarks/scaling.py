"""Where the time of a private step goes on this machine: ranks × batch → gradients, reduction, noise, data.

    uv run python benchmarks/scaling.py --ranks 1 2 --batches 16 64

Each run is a fit of a wide residual network on random images with gloo, one process a rank. Times are of rank 0, in
milliseconds a step, the median of the steps after the first. *Data* is what the loop waited for the loader; *sum over
ranks* contains waiting for slower ranks; *other* is the rest of the step: Lightning's hooks, the optimizer, logging.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism import gaussian
from lightning_dp.models import WideResNet

PARTS = ("gradients", "data", "noise", "sum over ranks", "other")


class Images(Dataset[Any]):
    """Random images, made when they are read."""

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 32, 32, generator=generator), index % 10


class Network(L.LightningModule):
    """A wide residual network, and a clock around the parts of its steps."""

    def __init__(self, depth: int, width: int) -> None:
        super().__init__()
        self.net = WideResNet(depth, width)
        self.spent: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self.steps: list[dict[str, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, *_: Any) -> None:
        """Start the clocks of a step."""
        self.spent = dict.fromkeys(PARTS, 0.0)
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop them."""
        whole = time.perf_counter() - self.began
        waited = float(self.trainer.callback_metrics.get("dp/data_wait", 0.0))
        self.spent["gradients"] -= waited
        self.spent["data"] = waited
        self.spent["other"] = whole - sum(self.spent.values())
        self.steps.append(self.spent)


def clocked(module: Network, part: str, function: Any) -> Any:
    """The same function; its time is counted for ``part``."""

    def call(*args: Any, **named: Any) -> Any:
        before = time.perf_counter()
        result = function(*args, **named)
        module.spent[part] += time.perf_counter() - before
        return result

    return call


def fit(ranks: int, batch: int, steps: int, depth: int, width: int, workers: int) -> dict[str, float]:
    """Median milliseconds of each part of a step."""
    module = Network(depth, width)
    loader = DataLoader(Images(), batch_size=1, num_workers=workers, persistent_workers=workers > 0)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "steps.json"

        def clock() -> None:
            strategy = module.trainer.strategy
            strategy.training_step = clocked(module, "gradients", strategy.training_step)
            strategy.reduce = clocked(module, "sum over ranks", strategy.reduce)
            add = clocked(module, "noise", gaussian.add_gaussian_noise)
            gaussian.add_gaussian_noise = add

        def save() -> None:
            if module.trainer.is_global_zero:
                to.write_text(json.dumps(module.steps[1:]))

        module.on_train_start, module.on_train_end = clock, save
        trainer = L.Trainer(
            accelerator="cpu", devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto", max_steps=steps + 1,
            max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
            callbacks=[DifferentialPrivacy(noise_multiplier=1.0, expected_batch_size=batch)],
        )  # fmt: skip
        add = gaussian.add_gaussian_noise
        trainer.fit(module, loader)
        gaussian.add_gaussian_noise = add
        found = json.loads(to.read_text())
    return {part: 1000 * statistics.median(step[part] for step in found) for part in PARTS}


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each run")
    parser.add_argument("--depth", type=int, default=16)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"| ranks | B | {' | '.join(PARTS)} |\n|--:|--:|{'--:|' * len(PARTS)}", flush=True)
    for batch in args.batches:
        for ranks in args.ranks:
            found = fit(ranks, batch, args.steps, args.depth, args.width, args.workers)
            print(f"| {ranks} | {batch} | {' | '.join(f'{found[part]:.1f}' for part in PARTS)} |", flush=True)


if __name__ == "__main__":
    main()
