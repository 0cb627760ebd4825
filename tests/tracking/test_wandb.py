"""A real WandbLogger, offline: its record is read back from disk."""

from __future__ import annotations

import json
import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import WandbLogger
from wandb.proto import wandb_internal_pb2

from lightning_dp import DifferentialPrivacy
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.reporting.runs import read_runs
from tests.conftest import PATIENCE, loader, regressor, trainer

BLOCK, HEADER = 32768, 7
TEMPLATE = Path(__file__).parents[2] / "docs" / "wandb.md"


def records(content: bytes) -> Iterator[bytes]:
    """The records of a W&B transaction log: LevelDB's log format after a seven-byte file header."""
    position, parts = HEADER, []
    assert content[:4] in (b"", b":W&B")
    while position + HEADER <= len(content):
        if BLOCK - position % BLOCK < HEADER:  # the rest of a block that cannot hold a header is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if position + HEADER + length > len(content):
            return  # still being written
        parts.append(content[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (1, 4):  # whole, or last part
            yield b"".join(parts)
            parts = []


def whole_record(file: Path) -> list[wandb_internal_pb2.Record]:
    """All records, once W&B's own process, which outlives ``finish``, has written the last of them."""
    for _ in range(PATIENCE * 10):
        found = [wandb_internal_pb2.Record.FromString(data) for data in records(file.read_bytes())]
        if found and found[-1].WhichOneof("record_type") == "exit":
            return found
        time.sleep(0.1)
    raise AssertionError(f"W&B did not finish its record within {PATIENCE} s")


def read_back(folder: Path) -> dict[str, Any]:
    """Config, history and summary from the .wandb file of the one run in ``folder``."""
    files = list(folder.rglob("*.wandb"))
    assert len(files) == 1
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    artifacts: list[str] = []

    def put(into: dict[str, Any], item: Any) -> None:
        keys = list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            into = into.setdefault(key, {})
        into[keys[-1]] = json.loads(item.value_json)

    for record in whole_record(files[0]):
        for update in (*record.config.update, *record.run.config.update):
            put(config, update)
        for update in record.summary.update:
            put(summary, update)
        if record.WhichOneof("record_type") == "request" and record.request.HasField("log_artifact"):
            artifacts.append(record.request.log_artifact.artifact.name)
        if record.artifact.name:
            artifacts.append(record.artifact.name)
        if record.history.item:
            row: dict[str, Any] = {}
            for item in record.history.item:
                put(row, item)
            history.append(row)
    found = {"config": config, "history": history, "summary": summary, "artifacts": artifacts}
    return {**found, "bytes": files[0].read_bytes()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_record_holds_plan_history_and_statement_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    keys: list[bytes] = []
    reveal = RandomKey.reveal

    def remember(self: RandomKey) -> bytes:
        keys.append(reveal(self))
        return keys[-1]

    monkeypatch.setattr(RandomKey, "reveal", remember)
    trainer(DifferentialPrivacy(epsilon=2.0, delta=1e-3), max_steps=1, default_root_dir=tmp_path).fit(
        regressor(), loader()
    )
    earlier = (tmp_path / "privacy.json").read_bytes()
    logger = WandbLogger(project="private", offline=True, save_dir=tmp_path)
    private = DifferentialPrivacy(epsilon=2.0, delta=1e-3)
    trainer(private, logger=logger, max_steps=6, log_every_n_steps=2).fit(regressor(), loader())
    logger.experiment.finish()

    record = read_back(tmp_path)
    plan = record["config"]["dp"]
    assert private.plan is not None
    assert plan["noise_multiplier"] == private.plan.noise_multiplier
    assert plan["dataset_size"] == 64
    assert plan["world_size"] == 1
    assert plan["target_epsilon"] == 2.0
    epsilons = [row["dp/epsilon"] for row in record["history"] if "dp/epsilon" in row]
    assert len(epsilons) == 3
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(private.statement().epsilon, rel=1e-5)
    assert record["summary"]["dp/statement"] == str(private.statement())
    assert record["summary"]["privacy"]["epsilon"] == private.statement().epsilon
    for name in re.findall(
        r"`(?:summary|config)\.([^`]+)`", TEMPLATE.read_text(encoding="utf-8")
    ):  # all that it names is there
        found = record["config"] | record["summary"]
        for key in [name] if name in found else name.split("."):
            found = found[key]
    (run,) = read_runs([tmp_path], "dp/epsilon")  # `lightning-dp report` reads the same
    assert [epsilon for _, epsilon in run.series["dp/epsilon"]] == epsilons
    assert [step for step, _ in run.series["dp/epsilon"]] == [2, 4, 6]
    assert (run.epsilon, run.size, run.logger) == (private.statement().epsilon, 64, "WandbLogger")
    assert record["summary"]["privacy"]["state"] == "ended"
    assert (
        record["summary"]
        .get("dp/epsilon_by_step", record["history"][-1].get("dp/epsilon_by_step"))["_type"]
        .startswith("images/")
    )
    assert list((tmp_path / "wandb").rglob("media/images/dp/epsilon_by_step_*.png"))
    assert record["artifacts"] == [f"privacy-{logger.experiment.id}"]
    assert (tmp_path / "privacy.json").read_bytes() == earlier
    written = (tmp_path / "privacy-2.json").read_bytes()
    assert written in [file.read_bytes() for file in (tmp_path / "staged").rglob("*") if file.is_file()]
    assert keys
    for key in keys:
        assert key not in record["bytes"]
        assert key.hex().encode() not in record["bytes"]
