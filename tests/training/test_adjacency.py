"""An example that is replaced by one that adds nothing moves a release by at most C/B, and only where it is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regressor, trainer

PLACE, STEPS, BATCH, SIZE = 5, 12, 4, 16


class Weighted(L.LightningModule):
    """Every example has a weight; of weight 0 it has no gradient. The weights of the module stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets, weights = batch
        return (weights * (self.net(inputs).squeeze(-1) - targets) ** 2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Releases(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.seen.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]).clone())


def releases(weight: float, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    weights = torch.full((SIZE,), 5.0)
    weights[PLACE] = weight
    data = TensorDataset(torch.randn(SIZE, 3, generator=generator), torch.randn(SIZE, generator=generator), weights)
    torch.manual_seed(0)
    seen = Releases()
    private = DifferentialPrivacy(
        noise_multiplier=1.0, delta=1e-3, clip_norm=0.5, seed=2, engine="vmap", adjacency="zero_out", **options
    )
    trainer(private, seen, max_steps=STEPS).fit(Weighted(), DataLoader(data, batch_size=BATCH))
    return torch.stack(seen.seen)


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({}, None),
        ({"sampling": "random_allocation"}, 3),  # blocks of four steps
        ({"sampling": "balls_in_bins", "noise": "lambda"}, 3),
    ],
    ids=["poisson", "allocation", "bins"],
)
def test_zero_out_is_what_is_said(options: dict[str, Any], turns: int | None) -> None:
    moved = (releases(5.0, **options) - releases(0.0, **options)).norm(dim=1)
    assert bool((moved <= 0.5 / BATCH * (1 + 1e-5)).all())
    drawn = int((moved > 0.1 / BATCH).sum())
    assert int((moved > 1e-6).sum()) == drawn
    assert drawn == turns if turns is not None else 0 < drawn < STEPS


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_a_run_says_whether_its_sizes_are_of_the_data(tmp_path: Path) -> None:
    def caveats(name: str, **options: Any) -> list[str]:
        limits = {key: options.pop(key) for key in ("max_steps", "max_epochs") if key in options}
        private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap", **options)
        one = trainer(private, default_root_dir=tmp_path / name, **limits)
        one.fit(regressor(), loader())
        written = json.loads((tmp_path / name / "privacy.json").read_text(encoding="utf-8"))
        assert written["neighbouring_relation"] == private.statement().neighbouring_relation
        return [one for one in written["caveats"] if "N = " in one or "number of steps" in one]

    (read,) = caveats("read", max_steps=2)
    assert read.startswith("N = 64 was read from the training data and counts as public")
    (given,) = caveats("given", max_steps=2, dataset_size=100)
    assert given == "N = 100 was given, and is taken to follow from nobody's data"
    epochs = caveats("epochs", max_steps=-1, max_epochs=1, dataset_size=100)
    assert [one[:35] for one in epochs] == [given[:35], "the number of steps follows from th"]
    (zero,) = caveats("zero", max_steps=-1, max_epochs=1, adjacency="zero_out")
    assert zero.startswith("N = 64 was read from the training data, and all neighbours have it")
    with pytest.raises(ValueError, match="adjacency='zero_out' with max_batch_size=30"):
        DifferentialPrivacy(noise_multiplier=1.0, adjacency="zero_out", max_batch_size=30)
