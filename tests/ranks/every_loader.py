"""Run by test_every_loader.py: two ranks whose data are loaded more than once, and ranks that are lost early."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import Dataset, Subset

from lightning_dp import DifferentialPrivacy, PrivateModelParallelStrategy
from lightning_dp.ranks import lost_ranks
from tests.conftest import Notes, Regressor, loader, regression_data, regressor, trainer
from tests.ranks.cluster import launch, on_cluster
from tests.ranks.sharded import Sharded
from tests.ranks.warm import train_once

EXAMPLES, EPOCHS = 48, 3


class Numbered(Dataset[Any]):
    """The data of the other tests, with each example's number beside it."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        self.data = regression_data(examples)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        return *self.data[index], int(index)


class Noisy(Numbered):
    """Augmented by a generator of its own, which nobody seeds; the label is as it was, if ``label`` says so."""

    def __init__(self, label: bool = True, order: Any = None, how_often: float = 1.0) -> None:
        super().__init__()
        self.rng, self.label, self.how_often = np.random.default_rng(), label, how_often
        self.order = range(EXAMPLES) if order is None else order

    def __getitem__(self, index: int) -> Any:
        inputs, target, number = super().__getitem__(int(self.order[index]))
        if self.rng.random() < self.how_often:
            inputs = inputs + torch.from_numpy(self.rng.normal(size=4).astype(np.float32))
        return (
            inputs,
            target if self.label else target + float(self.rng.normal()),
            number if self.label else int(self.rng.integers(10**6)),
        )


class Module(Regressor):
    """Loads its data at every epoch, and notes whose examples each step has."""

    def __init__(self, data: Callable[[int], Any]) -> None:
        super().__init__()
        self.data, self.steps, self.inside = data, Notes(), False

    def collate(self, rows: list[Any]) -> Any:
        if self.inside:
            self.steps[-1].extend(number for _, _, number in rows)
        return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])

    def train_dataloader(self) -> Any:
        self.given = self.data(self.current_epoch)
        return loader(self.given, 8, collate_fn=self.collate)

    def on_train_batch_start(self, *_: Any) -> None:
        self.steps.append(Notes())
        self.inside = True

    def on_train_batch_end(self, *_: Any) -> None:
        self.inside = False


class Resplits(L.Callback):
    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        if trainer.current_epoch:
            module.given.indices = np.random.default_rng(trainer.current_epoch).permutation(EXAMPLES).tolist()


def part(seed: Any) -> Subset[Any]:
    return Subset(Numbered(64), np.random.default_rng(seed).permutation(64)[:EXAMPLES].tolist())


def swapped(rank: int) -> Subset[Any]:
    order = list(range(EXAMPLES))
    if rank:
        order[1], order[2] = order[2], order[1]
    return Subset(Numbered(), order)


def cases(rank: int) -> dict[str, tuple[Callable[[int], Any], list[L.Callback]]]:
    other = np.random.default_rng(rank).permutation(EXAMPLES)
    return {
        "split anew on each rank": (lambda epoch: part((epoch, rank) if epoch else 0), []),
        "split anew alike": (part, []),
        "split on one rank, at the start": (lambda epoch: part((epoch, rank)), []),
        "split in place": (lambda epoch: part(0), [Resplits()]),
        "two are swapped": (lambda epoch: swapped(rank), []),
        "a generator of its own": (lambda epoch: Noisy(), []),
        "now and then": (lambda epoch: Noisy(how_often=0.2), []),
        "a generator of its own, in another order": (lambda epoch: Noisy(order=other), []),
        "all at random": (lambda epoch: Noisy(label=False), []),
        "raises on one rank": (lambda epoch: Subset(Numbered(), [*range(47), 47 + 100 * rank]), []),
    }


def all_of_them(folder: Path) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, (data, callbacks) in cases(int(os.environ["RANK"])).items():
        module, callback = Module(data), DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
        reloads = 0 if name == "split in place" else 1
        fit = on_cluster(
            callback, *callbacks, max_steps=-1, max_epochs=EPOCHS, reload_dataloaders_every_n_epochs=reloads
        )
        error = None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                fit.fit(module)
            except Exception as raised:
                error = f"{type(raised).__name__}: {raised}"
        said = [str(one.message) for one in caught if "at every time of reading" in str(one.message)]
        charged = 0 if callback.ledger is None else callback.ledger.steps
        told[name] = {
            "error": error,
            "charged": charged,
            "sampled": [list(step) for step in module.steps],
            "said": said,
        }
    return told


LOADERS = [(50, 8, False, 1.0), (50, 8, True, 1.0), (51, 4, True, 0.5), (33, 16, False, 3), (17, 8, False, 1.0)]


def epochs(folder: Path) -> dict[str, Any]:
    """The steps of two epochs, with privacy and without."""
    found: dict[str, Any] = {}
    for examples, batch_size, drop_last, limit in LOADERS:
        counts = []
        for callbacks in ([], [DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)]):
            fit = on_cluster(*callbacks, max_steps=-1, max_epochs=2, limit_train_batches=limit)
            fit.fit(regressor(), loader(regression_data(examples), batch_size, drop_last=drop_last))
            counts.append((fit.global_step, fit.num_training_batches, int(fit.estimated_stepping_batches)))
        found[f"{examples} {batch_size} {drop_last} {limit}"] = counts
    return found


class Dies(L.Callback):
    """Ends this process in a hook of Lightning's."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def lost(hook: str, sharded: bool = False) -> Callable[[Path], dict[str, Any]]:
    """Rank 1 dies in ``hook``. Returns what rank 0 ends with."""

    def case(_: Path) -> dict[str, Any]:
        lost_ranks.PATIENCE = timedelta(seconds=3)
        callback = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-4)
        timeout = timedelta(seconds=10)
        strategy = PrivateModelParallelStrategy(timeout=timeout) if sharded else DDPStrategy(timeout=timeout)
        fit = trainer(callback, devices=2, strategy=strategy, max_steps=4)
        if int(os.environ["RANK"]) == 1:
            fit.callbacks.append(Dies(hook))
        try:
            fit.fit(Sharded() if sharded else regressor(), loader())
        except Exception as error:
            charged = 0 if callback.ledger is None else callback.ledger.steps
            return {"error": str(error), "type": type(error).__name__, "charged": charged}
        return {"error": None}

    return case


EARLY = {"setup": False, "on_fit_start": False, "on_train_batch_start": True}


def main(folder: Path) -> None:
    launch(folder, "all", all_of_them, 2)
    launch(folder, "epochs", epochs, 2)
    for hook, sharded in EARLY.items():
        launch(folder, hook, lost(hook, sharded), 2)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    train_once()
    os.chdir(sys.argv[1])
    main(Path(sys.argv[1]))
