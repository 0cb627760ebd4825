"""What processes started by the Trainer spend is known in the process that started them, however they end."""

from __future__ import annotations

import copy
import gc
import json
import os
import signal
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from lightning_dp import DifferentialPrivacy
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched
from tests.new_process import in_a_new_process


class EndsAt(L.Callback):
    """Ends its own process in some way once so many steps of this fit are done."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.how == "raise":
                raise RuntimeError("in mid-fit")
            os.kill(os.getpid(), signal.SIGKILL)


def private() -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap")


def in_children(
    callback: DifferentialPrivacy, *others: L.Callback, strategy: str = "ddp_fork", **options: Any
) -> L.Trainer:
    one = trainer(callback, *others, strategy=strategy, devices=1, **{"max_steps": 6, **options})
    one.fit(regressor(), loader())
    return one


def ledger_of(checkpoint: Path) -> int:
    state = torch.load(checkpoint, weights_only=True)["callbacks"]["DifferentialPrivacy"]
    return sum(phase["steps"] for phase in state["ledger"]["phases"])


def spent_by_a_child_that_ends(how: str, before: int, folder: Path, strategy: str = "ddp_fork") -> None:
    """Some steps in this process, then some in a child that does not end well: the parent knows of all of them."""
    callback = private()
    if before:
        trainer(callback, max_steps=before, default_root_dir=folder).fit(regressor(), loader())
    one = trainer(callback, EndsAt(3, how), strategy=strategy, devices=1, max_steps=6, default_root_dir=folder)
    error = ProcessRaisedException if how == "raise" else ProcessExitedException
    with pytest.raises(error):
        one.fit(regressor(), loader())
    assert callback.ledger is not None
    assert callback.ledger.steps == callback.statement().steps == before + 3
    one.save_checkpoint(folder / "after.ckpt")
    assert ledger_of(folder / "after.ckpt") == before + 3
    record = json.loads((folder / "privacy.json").read_text())
    assert record["steps"] == before + 3 if how == "raise" else record["steps"] >= before + 3
    copies = copy.deepcopy(callback)
    assert copies.statement().steps == before + 3
    trainer(callback, max_steps=2, default_root_dir=folder).fit(regressor(), loader())
    assert callback.ledger.steps == before + 5  # nothing twice


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("how", ["raise", "kill"])
@in_a_new_process
def test_an_error_in_a_forked_child_is_counted_at_home(how: str, before: int, tmp_path: Path) -> None:
    spent_by_a_child_that_ends(how, before, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("how", ["raise", "kill"])
@in_a_new_process
def test_an_error_in_a_spawned_child_is_counted_at_home(how: str, tmp_path: Path) -> None:
    spent_by_a_child_that_ends(how, 2, tmp_path, "ddp_spawn")


@pytest.mark.nightly
@in_a_new_process
def test_several_children_count_as_one(tmp_path: Path) -> None:
    """Only one of them tells, and none of them listens."""
    callback = private()
    trainer(callback, max_steps=2, default_root_dir=tmp_path).fit(regressor(), loader())
    one = trainer(callback, EndsAt(4, "raise"), strategy="ddp_fork", devices=2, max_steps=6, default_root_dir=tmp_path)
    with pytest.raises(ProcessRaisedException):
        one.fit(regressor(), loader(batch_size=8))
    assert callback.statement().steps == 6
    again = trainer(callback, strategy="ddp_fork", devices=2, max_steps=3, default_root_dir=tmp_path)
    again.fit(regressor(), loader(batch_size=8))
    assert callback.statement().steps == 9
    assert json.loads((tmp_path / "privacy.json").read_text())["steps"] == 9


@in_a_new_process
def test_one_fit_after_another_in_children(tmp_path: Path) -> None:
    callback = private()
    in_children(callback, max_steps=2)
    assert (callback.ledger and callback.ledger.steps, callback.statement().steps) == (2, 2)
    one = in_children(callback, max_steps=3)
    one.save_checkpoint(tmp_path / "five.ckpt")
    assert ledger_of(tmp_path / "five.ckpt") == 5
    assert json.loads(Path("privacy.json").read_text())["steps"] == 5
    address = Path(callback._account.address)
    assert address.exists()
    assert address.stat().st_mode & 0o077 == 0
    trainer(callback, max_steps=1).fit(regressor(), loader())
    assert callback.statement().steps == 6
    assert not address.exists()


@in_a_new_process
def test_what_was_told_goes_with_the_callback() -> None:
    callback = private()
    in_children(callback, max_steps=1)
    address = Path(callback._account.address)
    assert address.exists()
    del callback
    gc.collect()
    assert not address.exists()


@in_a_new_process
def test_a_step_that_cannot_be_told_is_not_released(tmp_path: Path) -> None:
    """Charged in the child, and not released: the safe way round."""

    def no_room(*_: Any, **__: Any) -> None:
        raise OSError("no room")

    callback = private()
    with patched((tempfile, "mkstemp", no_room)), pytest.raises(ProcessRaisedException, match="set TMPDIR"):
        in_children(callback, default_root_dir=tmp_path / "run")
    assert callback.ledger is None
    assert not (tmp_path / "run" / "privacy.json").exists()
