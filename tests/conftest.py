"""Small modules, data and Trainers that the tests share."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("ci")
torch.set_num_threads(1)
logging.getLogger("lightning.pytorch").setLevel(logging.INFO)

PATIENCE = 1500
"""Seconds after which a process that a test has started is taken to hang. The slowest takes two minutes on two idle cores;
under a load of ten it must not be taken for one that hangs. The limit of pytest-timeout lies above."""


class Regressor(L.LightningModule):
    """A small smooth network; nothing in it knows about privacy."""

    def __init__(self, features: int = 4, hidden: int = 8, lr: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        self.lr = lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        loss = nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        inputs, targets = batch
        self.log("val/loss", nn.functional.mse_loss(self.net(inputs).squeeze(-1), targets))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Notes(list[Any], Dataset[Any]):
    """What a test writes down from inside training_step: no state that a step is held to, as no data set is."""


def regressor(seed: int = 0, **options: Any) -> Regressor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Regressor(**options)


def regression_data(examples: int = 64, features: int = 4, seed: int = 1) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, features, generator=generator)
    return TensorDataset(inputs, torch.sin(inputs.sum(-1)))


def loader(dataset: Any = None, batch_size: int = 16, **options: Any) -> DataLoader[Any]:
    return DataLoader(regression_data() if dataset is None else dataset, batch_size=batch_size, **options)


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "max_steps": 5,
        "max_epochs": -1,
    }
    return L.Trainer(callbacks=list(callbacks), **{**quiet, **options})


def sample_of(trainer: L.Trainer) -> Any:
    """The sample of the step under way, which hooks do not see."""
    step: Any = trainer.strategy
    return step.private_fit.planned.hooks.sample


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.fixture(autouse=True)
def _run_in_a_folder_of_its_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _seed_no_workers_that_another_test_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """``seed_everything(workers=True)``, as LightningCLI calls it, stays in the environment of the process."""
    for name in ("PL_SEED_WORKERS", "PL_GLOBAL_SEED"):
        monkeypatch.setenv(name, "")  # remembered, so that what the test sets is taken back
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _leave_no_process_group() -> Iterator[None]:
    """Training with ``ddp`` in this process leaves a group of one, its addresses and its threads: not for the next test."""
    with patch.dict(os.environ):
        yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    torch.set_num_threads(1)
