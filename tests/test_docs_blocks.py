"""Every block of Python in README and docs runs as it is written.

``module`` and ``datamodule`` are the reader's own: here a small regression. A Trainer takes two steps on one CPU, whatever
the page says.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(page, index, id=f"{page.name}-{index}")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for index in range(len(BLOCK.findall(page.read_text(encoding="utf-8"))))
]


class TwoSteps(L.Trainer):
    """A Trainer for this machine, of which nothing is left."""

    def __init__(self, **arguments: Any) -> None:
        here = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False,
                "enable_model_summary": False, "max_steps": 2}  # fmt: skip
        super().__init__(**{**arguments, **here})


class OfTheReader(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class DataOfTheReader(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(torch.randn(64, 3), torch.randn(64, 1)), batch_size=8)


@pytest.mark.parametrize(("page", "index"), BLOCKS)
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs_as_it_is_written(page: Path, index: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning", reason="one block is of the other root")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(L, "Trainer", TwoSteps)
    monkeypatch.setattr(pl, "Trainer", lambda **arguments: TwoSteps(**arguments))
    block = BLOCK.findall(page.read_text(encoding="utf-8"))[index]
    exec(
        compile(block, f"{page.name}, block {index}", "exec"),
        {"module": OfTheReader(), "datamodule": DataOfTheReader()},
    )


def test_blocks_are_found() -> None:
    assert len(BLOCKS) >= 20
