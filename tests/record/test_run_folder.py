"""A folder behind an address, as the Trainer takes it: the record is kept there, and no local folder is named like it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.record.run_folder import RunFolder
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched


def private() -> DifferentialPrivacy:
    return DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap")


def read(address: str) -> dict[str, Any]:
    with fsspec.open(address, "r", encoding="utf-8") as file:
        found: dict[str, Any] = json.load(file)
    return found


class Raises(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 5:
            raise RuntimeError("in mid-fit")


@pytest.mark.filterwarnings("ignore:An interrupted fit took 2 steps")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_run_behind_an_address_is_written_there_and_resumed_from_there(tmp_path: Path) -> None:
    root = f"memory://{tmp_path.name}/run"
    saver = ModelCheckpoint(f"{root}/ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    options: dict[str, Any] = {"default_root_dir": root, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="in mid-fit"):
        trainer(private(), saver, Raises(), max_steps=8, **options).fit(regressor(), loader())
    assert (read(f"{root}/privacy.json")["steps"], read(f"{root}/privacy.json")["state"]) == (5, "interrupted")
    first = read(f"{root}/privacy.json")
    trainer(private(), max_steps=2, default_root_dir=root).fit(regressor(), loader())  # somebody else's
    assert read(f"{root}/privacy.json") == first
    assert read(f"{root}/privacy-2.json")["steps"] == 2
    again = private()
    fit = trainer(again, max_steps=4, default_root_dir=root)
    fit.fit(regressor(), loader(), ckpt_path=f"{root}/ckpt/step=3.ckpt")
    assert again.ledger is not None
    assert again.ledger.steps == 4 + 2  # two were lost, as the journal in the working directory says
    assert read(f"{root}/privacy.json")["steps"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["privacy.journal"]


def test_a_local_address_is_a_path(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path / "logs")
    trainer(private(), default_root_dir=f"file://{tmp_path}/root", max_steps=1).fit(regressor(), loader())
    assert (tmp_path / "root" / "privacy.json").exists()
    trainer(private(), logger=logger, default_root_dir="memory://elsewhere", max_steps=1).fit(regressor(), loader())
    assert (Path(logger.log_dir) / "privacy.json").exists()


def test_an_address_that_nothing_installed_can_write_to_is_refused() -> None:
    with pytest.raises(
        PreflightError, match="default_root_dir='nowhere://run': expected a folder that can be written to"
    ):
        trainer(private(), default_root_dir="nowhere://run", max_steps=1).fit(regressor(), loader())


def test_errors_of_a_store_are_told_like_those_of_a_disk(tmp_path: Path) -> None:
    class StoreError(Exception):
        pass

    def lost(*_: Any, **__: Any) -> None:
        raise StoreError("no credentials")

    folder = RunFolder(f"memory://{tmp_path.name}")
    with patched((type(folder._system), "open", lost)), pytest.raises(OSError, match="StoreError: no credentials"):
        folder.write("privacy.json", "{}")
    with (
        patched((type(folder._system), "open", lost)),
        pytest.warns(UserWarning, match=r"privacy\.json cannot be written \(StoreError: no credentials\)"),
    ):
        trainer(private(), default_root_dir=f"memory://{tmp_path.name}", max_steps=1).fit(regressor(), loader())
    folder.remove("privacy.json")  # there is none, which is as well
