"""Run as a script: engines compared at every step, on two gloo ranks and in bfloat16. Used by test_comparisons.py."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines import ghost, vmap
from lightning_dp.step import engine_comparison
from tests.conftest import loader
from tests.ranks.cluster import launch, on_cluster
from tests.ranks.warm import train_once

STEPS = 3


class Classifies(L.LightningModule):
    """A classifier without BatchNorm, of whatever kind."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Words(nn.Module):
    """Embeddings, their positions, a layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(12, 8), nn.Parameter(0.1 * torch.randn(6, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.layer(self.words(tokens) + self.places).mean(1))
        return found


def pictures() -> tuple[nn.Module, TensorDataset]:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(8, 8, 3, stride=2),
        nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip
    return net, TensorDataset(torch.randn(24, 1, 6, 6), torch.randint(3, (24,)))


def words() -> tuple[nn.Module, TensorDataset]:
    return Words(), TensorDataset(torch.randint(12, (24, 6)), torch.randint(3, (24,)))


def recurrent() -> tuple[nn.Module, TensorDataset]:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.head(self.layer(x)[0][:, -1])
            return found

    return Last(), TensorDataset(torch.randn(24, 5, 4), torch.randint(3, (24,)))


ORDINARY = [
    *((make, "ghost", precision) for make in (pictures, words, recurrent) for precision in ("32-true", "bf16-mixed")),
    *((pictures, "vmap", precision) for precision in ("32-true", "bf16-mixed")),
    (words, "vmap", "32-true"),
]


def fit(make: Callable[[], tuple[nn.Module, TensorDataset]], engine: Any, precision: str) -> dict[str, Any]:
    """A few steps, all of them compared; how many steps there were and how many contributions were compared."""
    compared, plain = [], engine_comparison.compare_contributions
    engine_comparison.compares_at = lambda key, step: True
    engine_comparison.compare_contributions = lambda *given, **named: compared.append(plain(*given, **named))
    torch.manual_seed(0)
    net, data = make()
    module = Classifies(net)
    private = DifferentialPrivacy(noise_multiplier=1.0, clip_norm=0.1, seed=5, engine=engine, expected_batch_size=12)
    on_cluster(private, max_steps=STEPS, precision=precision).fit(module, loader(data, 4))
    assert private.ledger is not None
    return {"steps": private.ledger.steps, "compared": len(compared)}


def ordinary(_: Path) -> dict[str, Any]:
    """All of them, one after the other."""
    return {
        f"{make.__name__} {engine} {precision}": fit(make, engine, precision) for make, engine, precision in ORDINARY
    }


def wrong_on(rank: int, make: Any, engine: str, precision: str) -> Callable[[Path], dict[str, Any]]:
    """From step 1 on, the contributions of one rank's engine are too long by a half."""

    def case(_: Path) -> dict[str, Any]:
        kind: Any = {"ghost": ghost.GhostEngine, "vmap": vmap.VmapEngine}[engine]
        plain, begun = kind.clipped_sum, []
        through = engine_comparison.EngineComparison.passed

        def passed(self: Any, *given: Any) -> Any:
            begun[:] = [self.step]
            return through(self, *given)

        def clipped_sum(self: Any, *given: Any, **named: Any) -> Any:
            found = plain(self, *given, **named)
            if begun[-1:] < [1] or int(os.environ["RANK"]) != rank:
                return found
            return replace(found, gradient={name: 1.5 * one for name, one in found.gradient.items()})

        engine_comparison.EngineComparison.passed = passed
        kind.clipped_sum = clipped_sum
        return fit(make, engine, precision)

    return case


WRONG = {
    f"wrong_{rank}_{make.__name__}_{engine}_{precision.replace('-', '_')}": (rank, make, engine, precision)
    for rank, make, engine, precision in (
        (0, recurrent, "ghost", "32-true"),
        (1, recurrent, "ghost", "bf16-mixed"),
        (1, words, "vmap", "32-true"),  # with dropout: an engine may draw in another order, but not clip less
    )
}


def main(folder: Path) -> None:
    launch(folder, "ordinary", ordinary, 2)
    for name, of in WRONG.items():
        launch(folder, name, wrong_on(*of), 2)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    train_once()
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
