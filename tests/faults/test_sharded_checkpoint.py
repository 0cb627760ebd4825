"""A sharded checkpoint is read by torch's own loader, which unpickles: what is not torch's own is refused before."""

from __future__ import annotations

import io
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from lightning_dp import PreflightError
from lightning_dp.record.sharded_checkpoint import METADATA, REST, check_sharded_checkpoint
from lightning_dp.strategy import PrivateModelParallelStrategy
from tests.faults.test_checkpoints import Bomb

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Lightning writes it: tensors and plain values by torch.distributed.checkpoint, and the rest in one file."""
    path = tmp_path / "sharded.ckpt"
    weight = torch.arange(6.0).reshape(2, 3)
    groups = {"lr": 0.1, "betas": (0.9, 0.99), "nesterov": False, "step": torch.tensor(3.0)}
    content = {"state_dict": {"weight": weight}, "optimizer_0": {"state": {"weight": weight}, "param_groups": groups}}
    dcp.save(content, checkpoint_id=path, no_dist=True)
    torch.save({"global_step": 3, "callbacks": {}}, path / REST)
    return path


def refusal(path: Path, **options: Any) -> str:
    strategy = PrivateModelParallelStrategy()
    strategy.parallel_devices = [torch.device("cpu")]
    with pytest.raises(PreflightError) as refused:
        strategy.load_checkpoint(path, **options)
    return str(refused.value)


def test_what_torch_writes_is_let_through(folder: Path) -> None:
    check_sharded_checkpoint(folder)


@pytest.mark.parametrize("weights_only", [None, True])
@pytest.mark.parametrize("place", ["metadata", "inside metadata", "of one rank", "rest", "entry"])
def test_a_pickle_bomb_does_not_go_off(folder: Path, place: str, weights_only: bool | None) -> None:
    crater = folder.parent / "crater"
    if place == "metadata":
        (folder / METADATA).write_bytes(pickle.dumps(Bomb(crater)))
    elif place == "inside metadata":
        index = pickle.loads((folder / METADATA).read_bytes())
        index.planner_data = Bomb(crater)
        (folder / METADATA).write_bytes(pickle.dumps(index))
    elif place == "of one rank":  # torch falls back to it
        (folder / f"__0{METADATA}").write_bytes(pickle.dumps(Bomb(crater)))
    elif place == "rest":
        torch.save({"extra": Bomb(crater)}, folder / REST)
    else:
        live = io.BytesIO()
        torch.save(Bomb(crater), live)
        index = pickle.loads((folder / METADATA).read_bytes())
        entry = next(key for key in index.storage_data if key.fqn.endswith("lr"))
        size = (folder / "__0_0.distcp").stat().st_size
        with (folder / "__0_0.distcp").open("ab") as file:
            file.write(live.getvalue())
        index.storage_data[entry].offset, index.storage_data[entry].length = size, len(live.getvalue())
        (folder / METADATA).write_bytes(pickle.dumps(index))
    said = refusal(folder, weights_only=weights_only)
    assert said.startswith(f"ckpt_path={folder} cannot be read")
    assert not crater.exists()


def test_torch_itself_would_run_it(folder: Path) -> None:
    """So the checks above check something."""
    crater = folder.parent / "crater"
    (folder / METADATA).write_bytes(pickle.dumps(Bomb(crater)))
    with suppress(CheckpointException):
        dcp.load({"state_dict": {"weight": torch.zeros(2, 3)}}, checkpoint_id=folder, no_dist=True)
    assert crater.exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret", "pipe"])
def test_files_that_are_not_its_own_are_not_read(folder: Path, name: str) -> None:
    (folder.parent / "secret").write_bytes(b"secret")
    os.mkfifo(folder / "pipe")
    index = pickle.loads((folder / METADATA).read_bytes())
    for place in index.storage_data.values():
        place.relative_path = name
    (folder / METADATA).write_bytes(pickle.dumps(index))
    assert "expected a" in refusal(folder)


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps([1]), pickle.dumps({"state_dict_metadata": {}})])
def test_an_index_that_is_none_is_refused(folder: Path, content: bytes) -> None:
    (folder / METADATA).write_bytes(content)
    assert "cannot be read" in refusal(folder)


@pytest.mark.parametrize("name", [METADATA, REST])
def test_a_pipe_is_not_waited_for(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "expected a plain file" in refusal(folder)
