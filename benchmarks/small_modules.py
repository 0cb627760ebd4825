"""What a private step costs a small module, where nearly all of it is Python and the calls of small kernels.

    OMP_NUM_THREADS=1 uv run python benchmarks/small_modules.py
    OMP_NUM_THREADS=1 uv run python benchmarks/small_modules.py --cases mlp:8 --profile 40

Processor time of a Trainer's step, private and without privacy, in turns; it is the difference of a long and a short fit, so
that nobody's hook stands between the steps. And processor time from ``fit`` to the first step: what is tried and planned.
"""

from __future__ import annotations

import argparse
import cProfile
import logging
import pstats
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, get_args

import lightning as L
import torch
from engine_models import perceptron
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines.select import EngineName

SHORT, LONG = 10, 60
CLASSES = 10


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(16, 32, batch_first=True), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.cells(x)[0][:, -1])
        return found


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (perceptron, (32,)),
    "lstm": (_Recurrent, (12, 16)),
}
"""Name → makes the module, shape of an example."""


class _Module(L.LightningModule):
    """One of them, trained in the plainest way."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy, logged as modules do."""
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    name: str,
    size: int,
    private: bool,
    steps: int,
    profile: cProfile.Profile | None = None,
    engine: EngineName = "auto",
) -> float:
    """Processor time of a fit.

    Args:
        name: name in ``CASES``.
        size: batch size; with privacy the expected one.
        private: whether with the callback.
        steps: how many.
        profile: is on meanwhile.
        engine: which.
    """
    torch.manual_seed(0)
    make, shape = CASES[name]
    data = TensorDataset(torch.randn(64 * size, *shape), torch.randint(CLASSES, (64 * size,)))
    callbacks: list[Any] = [DifferentialPrivacy(noise_multiplier=1.0, clip_norm=1.0, engine=engine)] if private else []
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    loader = DataLoader(data, batch_size=size, shuffle=True)
    started = time.process_time()
    if profile is not None:
        profile.enable()
    trainer.fit(_Module(make()), loader)
    if profile is not None:
        profile.disable()
    return time.process_time() - started


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cases", nargs="+", default=["mlp:8", "mlp:64", "lstm:8", "lstm:64"], help="module:batch_size"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine", default="auto", choices=get_args(EngineName))
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="also the N functions that took most")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print("| module | batch | ms a step without privacy | with | ÷ | s before the first step, without | with |")
    print("|---|--:|--:|--:|--:|--:|--:|", flush=True)
    for case in arguments.cases:
        name, size = case.split(":")
        fit(name, int(size), True, 1, engine=arguments.engine)  # what is imported and initialised once
        steps: dict[bool, list[float]] = {False: [], True: []}
        before: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(arguments.rounds):
            for private in steps:
                short, long = (fit(name, int(size), private, count, engine=arguments.engine) for count in (SHORT, LONG))
                steps[private].append((long - short) / (LONG - SHORT))
                before[private].append(short - SHORT * steps[private][-1])
        plain, ours = (1e3 * statistics.median(steps[private]) for private in (False, True))
        first = (f"{max(0.0, statistics.median(before[private])):.2f}" for private in (False, True))
        print(f"| {name} | {size} | {plain:.2f} | {ours:.2f} | {ours / plain:.1f} | {' | '.join(first)} |", flush=True)
        if arguments.profile:
            profile = cProfile.Profile()
            fit(name, int(size), True, 2 * LONG, profile, arguments.engine)
            pstats.Stats(profile).sort_stats("tottime").print_stats(arguments.profile)


if __name__ == "__main__":
    main()
