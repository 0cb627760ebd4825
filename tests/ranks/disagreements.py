"""Two ranks that do not run the same thing: each case ends with the sentence it ended with on this rank."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from torch import nn
from torch.utils.data import IterableDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Ledger
from lightning_dp.ranks import agreement
from lightning_dp.record.checkpoint import Spent, with_digest
from tests.conftest import loader, regression_data, regressor
from tests.mechanism.laws import plan

Case = Callable[[int], tuple[DifferentialPrivacy, dict[str, Any], dict[str, Any]]]
"""From the rank to the callback, options of the Trainer, and changes to what is fitted."""


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(regression_data())


def private(**arguments: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "expected_batch_size": 16, **arguments})


CASES: dict[str, Case] = {
    "nothing": lambda rank: (private(physical_batch_size=3 + rank, engine=("vmap", "loop")[rank]), {}, {}),
    "seed": lambda rank: (private(seed=rank), {}, {}),
    "one seed": lambda rank: (private(seed=(None, 7)[rank]), {}, {}),
    "clip norm": lambda rank: (private(clip_norm=1.0 + rank), {}, {}),
    "noise multiplier": lambda rank: (private(noise_multiplier=1.0 + rank), {}, {}),
    "budget": lambda rank: (private(noise_multiplier=None, epsilon=4.0 + rank), {}, {}),
    "delta": lambda rank: (private(delta=(1e-3, 1e-4)[rank]), {}, {}),
    "logging": lambda rank: (private(log_train_metrics=rank == 0), {}, {}),
    "steps": lambda rank: (private(), {"max_steps": 3 + rank}, {}),
    "precision": lambda rank: (private(), {"precision": ("32-true", "bf16-mixed")[rank]}, {}),
    "length": lambda rank: (private(), {}, {"data": loader(regression_data(64 + rank))}),
    "length, with N given": lambda rank: (private(dataset_size=80), {}, {"data": loader(regression_data(64 + rank))}),
    "batch size": lambda rank: (private(expected_batch_size=None), {}, {"data": loader(batch_size=8 + rank)}),
    "stream on one": lambda rank: (private(), {}, {"data": loader(Stream()) if rank else loader()}),
    "order": lambda rank: (private(), {}, {"data": loader(regression_data(seed=rank))}),
    "users": lambda rank: (private(privacy_unit=[index % (20 + 12 * rank) % 20 for index in range(64)]), {}, {}),
    "BatchNorm on one": lambda rank: (private(), {}, {"layer": nn.BatchNorm1d(8) if rank else nn.Identity()}),
    "version": lambda rank: (private(), {}, {"version": f"9.{rank}"}),
    "checkpoint on one": lambda rank: (private(), {"max_steps": 6}, {"charged": 3 - 3 * rank}),
    "ledgers": lambda rank: (private(), {"max_steps": 6}, {"charged": 3 + rank}),
}


def all_of_them(on_cluster: Callable[..., L.Trainer], folder: Path) -> dict[str, Any]:
    """The sentence each case ends with here, or ``None``."""
    rank = int(os.environ["RANK"])
    told: dict[str, Any] = {}
    for name, case in CASES.items():
        callback, options, changes = case(rank)
        module: Any = regressor()
        module.net[1] = changes.get("layer", module.net[1])
        fit = on_cluster(callback, **{"max_steps": 3, **options})
        if "charged" in changes:
            fit.callbacks.insert(0, Restored(callback, changes["charged"]))
        agreement.__version__ = changes.get("version", "1.0")
        try:
            fit.fit(module, changes["data"] if "data" in changes else loader())
            told[name] = None
        except Exception as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


class Restored(L.Callback):
    """Gives the callback a checkpoint's ledger, or none, after Lightning would have."""

    def __init__(self, private: DifferentialPrivacy, charged: int) -> None:
        self.private, self.charged = private, charged

    def on_fit_start(self, *_: Any) -> None:
        ledger = Ledger(plan(noise_multiplier=1.0, dataset_size=64, expected_batch_size=16))
        for _step in range(self.charged):
            ledger.charge()
        self.private.load_state_dict(with_digest(Spent(ledger.state_dict())) if self.charged else {})
