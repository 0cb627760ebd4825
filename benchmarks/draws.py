"""What it costs that each example draws for itself.

    uv run python benchmarks/draws.py

The clipped sum of one micro-batch of nets with dropout, with a seed of each example and with the global generators, in turn.
Prints the median ratio of the processor time, and the same for nets that draw nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dp.batches.seeded import seeded
from lightning_dp.engines.ghost.engine import GhostEngine
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine
from lightning_dp.engines.vmap import VmapEngine


class Perceptron(nn.Sequential):
    """Three layers, two of them with dropout."""

    shape, rows = (64,), 64

    def __init__(self, p: float) -> None:
        wide = [nn.Linear(64, 128), nn.ReLU(), nn.Dropout(p), nn.Linear(128, 128), nn.ReLU(), nn.Dropout(p)]
        super().__init__(*wide, nn.Linear(128, 10))


class Convolutional(nn.Sequential):
    """Three convolutions with dropout."""

    shape, rows = (3, 16, 16), 32

    def __init__(self, p: float) -> None:
        first = [nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Dropout2d(p)]
        second = [nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.Dropout(p)]
        last = [nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(), nn.Dropout(p), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*first, *second, *last, nn.Linear(32, 10))


class Transformer(nn.Module):
    """Two layers of attention, 64 positions."""

    shape, rows = (64, 32), 16

    def __init__(self, p: float) -> None:
        super().__init__()
        self.first = nn.Linear(32, 128)
        self.layers = nn.Sequential(
            *(nn.TransformerEncoderLayer(128, 4, 512, dropout=p, batch_first=True) for _ in range(2))
        )
        self.last = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Features to scores."""
        return self.last(self.layers(self.first(x)).mean(1))


def seconds(call: Callable[[], Any]) -> float:
    """Processor time of a call."""
    begun = time.process_time()
    call()
    return time.process_time() - begun


def ratio(net: nn.Module, engine: Engine, shape: tuple[int, ...], rows: int, repeats: int) -> float:
    """Time with a seed of each example ÷ time without, the median of interleaved calls."""
    batch = torch.randn(rows, *shape), torch.randint(10, (rows,))
    parameters = dict(net.named_parameters())

    def loss_function(given: Any, example: Any) -> tuple[Tensor, Any]:
        return F.cross_entropy(functional_call(net, dict(given), (example[0],)), example[1]), {}

    def run(given: Any) -> float:
        return seconds(lambda: engine.clipped_sum(loss_function, parameters, given, rows, 1.0))

    own = seeded(batch, np.arange(rows, dtype=np.uint64), 5)
    pairs = [(run(batch), run(own)) for _ in range(repeats + 3)]
    return statistics.median(second / first for first, second in pairs[3:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30, help="calls of each kind")
    repeats = parser.parse_args().repeats
    print("| | engine | with dropout | without |\n|---|---|---|---|")
    for make in (Perceptron, Convolutional, Transformer):
        kinds: dict[str, Callable[[nn.Module], Engine]] = {
            "ghost": GhostEngine, "vmap": lambda net: VmapEngine(), "loop": lambda net: LoopEngine(),
        }  # fmt: skip
        for name, engine in kinds.items():
            found = [ratio(net, engine(net), make.shape, make.rows, repeats) for net in (make(0.1), make(0.0))]
            print(f"| {make.__name__} | `{name}` | {found[0]:.2f} | {found[1]:.2f} |", flush=True)


if __name__ == "__main__":
    main()
