"""What the processes of a launch do: each case trains, and returns what this rank has at the end."""

from __future__ import annotations

import json
import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor
from torch.utils.data import Dataset

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, HeldRecords
from lightning_dp.audit import audit
from lightning_dp.mechanism import gaussian as gaussian_module
from lightning_dp.ranks import lost_ranks
from lightning_dp.record.journal import FILE_NAME
from tests.conftest import Notes, Regressor, loader, regression_data, regressor, sample_of, weights
from tests.guarantees import mutations
from tests.ranks.ranks import Shift

STEPS = 6
RANK = "RANK"


def rank_here() -> int:
    return int(os.environ.get(RANK, 0))


SETTINGS: dict[str, Any] = {"noise_multiplier": 0.5, "clip_norm": 0.3, "seed": 7, "expected_batch_size": 16}


def private(**arguments: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{**SETTINGS, **arguments})


def audited(on: Any) -> dict[str, Any]:
    """An audit by all processes of the launch; no statement is published of a run whose seed is known, so it may be known."""

    def found() -> dict[str, Any]:
        fit = on(private(noise_multiplier=3.0), max_steps=4)
        return audit(fit, regressor(), loader(), gradient_canaries=2000, input_canaries=4, seed=3).to_dict()

    right = found()
    with mutations.noise_scaled(0.1):
        broken = found()
    of_the_loader = private(expected_batch_size=None, noise_multiplier=3.0)
    claimed = audit(
        on(of_the_loader, max_steps=1), regressor(), loader(), gradient_canaries=2, input_canaries=0, seed=3
    ).epsilon_claimed
    without_seed = refusal(lambda: audit(on(private(), max_steps=1), regressor(), loader(), gradient_canaries=2))
    return {"right": right, "broken": broken, "claimed": claimed, "without a seed": without_seed}


def refusal(case: Any) -> str:
    try:
        case()
    except ValueError as error:
        return str(error)
    return ""


def outcome(module: Any, callback: DifferentialPrivacy) -> dict[str, Any]:
    assert callback.ledger is not None
    return {
        "weights": weights(module),
        "steps": callback.ledger.steps,
        "statement": str(callback.statement()),
        "privacy": callback.statement().to_dict(),
    }


class Reads(Dataset[Any]):
    """The data of the other tests, with a list of what has been read."""

    def __init__(self) -> None:
        self.data, self.read = regression_data(), Notes()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.read.append(int(index))
        return self.data[index]


class Slow(Regressor):
    """Every rank takes another time over a step, and the last one the longest."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(0.05 * rank_here())


def plain(make_trainer: Any, max_steps: int = STEPS, **options: Any) -> dict[str, Any]:
    """Six steps; the same at any number of ranks and nodes."""
    module, callback = regressor(), private()
    make_trainer(callback, max_steps=max_steps, **options).fit(module, loader())
    return outcome(module, callback)


def uneven(make_trainer: Any) -> dict[str, Any]:
    """Ranks that differ in everything that may differ: micro-batches, engine, speed, and how many examples they get."""
    torch.manual_seed(0)
    module = Slow()
    callback = private(
        expected_batch_size=2,  # so that some ranks are often empty, and now and then all of them
        physical_batch_size=1 + rank_here(),
        engine=("vmap", "loop", "ghost")[rank_here() % 3],
    )
    data, sampled = Reads(), Sampled()
    make_trainer(callback, sampled, max_steps=12).fit(module, loader(data))
    return {**outcome(module, callback), "read": list(data.read), "sampled": sampled.indices}


def counted(make_trainer: Any) -> dict[str, Any]:
    """What goes between the ranks in each step, whatever the batch, the views and the micro-batches."""
    found: dict[str, Any] = {}
    for name, batch, views, physical in (("small", 8, 0, 64), ("large", 48, 0, 5), ("views", 16, 3, 2)):
        module, callback = regressor(), private(expected_batch_size=batch, physical_batch_size=physical)
        fit = make_trainer(callback, max_steps=3)
        if views:
            fit.callbacks.append(AugmentationMultiplicity(k=views, transform=Shift(), images=0))
        with Traffic() as traffic:
            module.on_train_batch_start = traffic.step
            fit.fit(module, loader())
        found[name] = {"steps": traffic.steps, "parameters": sum(p.numel() for p in module.parameters())}
    return found


SHARDS = [range(0, 9), range(9, 30), range(30, 31), range(31, 55), range(55, 64)]


def read_shard(shard: range) -> Any:
    data = regression_data()
    return (data[index] for index in shard)


class Shards(L.LightningDataModule):
    """Records of shards, read where the ranks have met."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = {"shards": SHARDS, "read": read_shard, **arguments}

    def setup(self, stage: str) -> None:
        self.records = HeldRecords(**self.arguments)

    def train_dataloader(self) -> Any:
        return loader(self.records)


def held(make_trainer: Any) -> dict[str, Any]:
    """The run of :func:`plain`, with data that can only be read from beginning to end."""
    module, callback, data, sampled = regressor(), private(), Shards(), Sampled()
    make_trainer(callback, sampled, max_steps=STEPS).fit(module, datamodule=data)
    return {**outcome(module, callback), "sampled": sampled.indices, "here": data.records.here.tolist()}


TOO_EARLY = HeldRecords(SHARDS, read_shard)


def fails_on_one(shard: range) -> Any:
    if rank_here() == 1:
        raise OSError("the disk is gone")
    return read_shard(shard)


WRONG_SHARDS: dict[str, dict[str, Any]] = {
    "everything on every rank": {"read": lambda shard: list(regression_data())},
    "one record twice": {"read": lambda shard: [*read_shard(shard), regression_data()[63]]},
    "unreadable on one": {"read": fails_on_one},
    "other shards": {"shards": lambda: SHARDS[rank_here() :]},
    "too few": {"shards": lambda: SHARDS[:1]},
    "empty": {"shards": lambda: [*SHARDS, range(0)]},
    "counted": {"read": lambda shard: [*read_shard(shard), regression_data()[63]], "copies": "count"},
}


def wrong_shards(make_trainer: Any) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, changed in WRONG_SHARDS.items():
        arguments = {key: value() if key == "shards" else value for key, value in changed.items()}
        try:
            callback = private()
            make_trainer(callback, max_steps=1).fit(regressor(), datamodule=Shards(**arguments))
            told[name] = callback.statement().to_dict()["dataset_size"]
        except ValueError as error:
            told[name] = f"{type(error).__name__}: {error}"
    try:
        make_trainer(private(), max_steps=1).fit(regressor(), loader(TOO_EARLY))
    except ValueError as error:
        told["too early"] = f"{type(error).__name__}: {error}"
    return told


class Traffic:
    """Writes down every collective call of torch.distributed, with its bytes, step by step."""

    TENSOR = ("all_reduce", "broadcast", "reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather")
    OTHER = ("broadcast_object_list", "all_gather_object", "gather_object", "scatter", "send", "recv")

    def __init__(self) -> None:
        self.steps: list[list[tuple[str, int, str]]] = []

    def step(self, *_: Any) -> None:
        self.steps.append([])

    def note(self, name: str, tensor: Any, op: Any) -> None:
        if self.steps:
            size = tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else -1
            self.steps[-1].append((name, size, f"{getattr(tensor, 'dtype', '')} {op}"))

    def __enter__(self) -> Traffic:
        self._kept = {name: getattr(dist, name) for name in (*self.TENSOR, *self.OTHER)}

        def watched(name: str, original: Any) -> Any:
            def call(first: Any, *rest: Any, **named: Any) -> Any:
                self.note(name, first, named.get("op", ""))
                return original(first, *rest, **named)

            return call

        for name, original in self._kept.items():
            setattr(dist, name, watched(name, original))
        return self

    def __exit__(self, *_: Any) -> None:
        for name, original in self._kept.items():
            setattr(dist, name, original)


class Dies(L.Callback):
    """Sends a signal to this process before step ``step``."""

    def __init__(self, step: int, how: int) -> None:
        self.step, self.how = step, how

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.how)


def lost(make_trainer: Any, which: int, how: int) -> dict[str, Any]:
    """One rank dies, or falls silent, in the middle of a run. Returns what the others end with."""
    lost_ranks.PATIENCE = timedelta(seconds=8)
    module, callback = regressor(), private()
    fit = make_trainer(callback, max_steps=STEPS, strategy=DDPStrategy(timeout=timedelta(seconds=15)))
    if rank_here() == which:
        fit.callbacks.append(Dies(2, how))
    try:
        fit.fit(module, loader())
    except Exception as error:
        assert callback.ledger is not None
        return {"error": str(error), "type": type(error).__name__, "steps": callback.ledger.steps}
    return {"error": None}


KILLED_AT, SAVED_AT = 3, 2
"""A rank is lost at the first step number, counted from 0; the last checkpoint is the one after so many steps."""


class DiesOnceCharged(L.Callback):
    """Ends this process at a step that rank 0, which waits for this rank in it, has already charged."""

    def __init__(self, journal: Path) -> None:
        self.journal = journal

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == KILLED_AT:
            while json.loads(self.journal.read_text())["steps"] <= KILLED_AT:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def killed_once(make_trainer: Any, folder: Path) -> dict[str, Any]:
    """A run that saves every second step and starts from the last checkpoint; once, a rank is killed."""
    lost_ranks.PATIENCE = timedelta(seconds=1)
    folder = folder / "restarts"
    module, callback, sampled = regressor(), private(), Sampled()
    saved = ModelCheckpoint(folder, every_n_train_steps=SAVED_AT, save_last=True)
    fit = make_trainer(callback, saved, sampled, max_steps=STEPS, enable_checkpointing=True, default_root_dir=folder)
    if rank_here() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        fit.callbacks.append(DiesOnceCharged(folder / FILE_NAME))
    fit.fit(module, loader(), ckpt_path="last")
    assert callback.ledger is not None
    return {**outcome(module, callback), "steps_here": len(sampled.indices), "changed": callback.ledger.changed}


def stretch(make_trainer: Any, folder: Path, until: int, seed: int | None = 7, **arguments: Any) -> dict[str, Any]:
    """A part of a run: from the checkpoint of the last stretch, if there is one, to step ``until``."""
    module, callback = regressor(), private(seed=seed, **arguments)
    noised: list[int] = []
    add = gaussian_module.add_gaussian_noise

    def noted(*parts: Any, **named: Any) -> None:
        noised.append(named["step"])
        add(*parts, **named)

    gaussian_module.add_gaussian_noise = noted
    fit = make_trainer(callback, max_steps=until)
    fit.callbacks.append(sampled := Sampled())
    last = folder / f"stretch-{seed}.ckpt"
    fit.fit(module, loader(), ckpt_path=last if last.exists() else None)
    gaussian_module.add_gaussian_noise = add
    fit.save_checkpoint(last)
    return {**outcome(module, callback), "noised": noised, "sampled": sampled.indices}


class SavesAt(L.Callback):
    """Saves a checkpoint in the middle of a run."""

    def __init__(self, step: int, file: Path) -> None:
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


def correlated(make_trainer: Any, folder: Path) -> dict[str, Any]:
    """Six steps with each kind of correlated noise, and the last of them again from the checkpoint of the launch before."""
    found: dict[str, Any] = {}
    for noise in ("banded", "lambda", "bisr"):
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        arguments = {"sampling": "cyclic_poisson", "noise": noise, "noise_bands": 3, "noise_momentum": 0.9}
        module, callback = regressor(), private(**arguments)
        saves = SavesAt(3, folder / f"correlated_{noise}_{ranks}.ckpt")
        make_trainer(callback, saves, max_steps=STEPS).fit(module, loader())
        found[noise] = outcome(module, callback)
        before = folder / f"correlated_{noise}_{ranks - 1}.ckpt"
        if before.exists():
            module, callback = regressor(), private(**arguments)
            make_trainer(callback, max_steps=STEPS).fit(module, loader(), ckpt_path=before)
            found[f"{noise}, resumed"] = outcome(module, callback)
    return found


class Sampled(L.Callback):
    """Which examples this rank was given at each step."""

    def __init__(self) -> None:
        self.indices: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.indices.append(sample_of(trainer).indices.tolist())
