"""One record per run: nobody else's run replaces it, and it never says less than was spent."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_dp.record.whole_file as whole_file_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.record.journal import JournalError
from lightning_dp.record.run_folder import LONGEST, RunFolder
from lightning_dp.record.run_record import RunRecord
from lightning_dp.record.written import name_of, records_in
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
]


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})


def read(path: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(path).read_text())
    return found


def said_in(record: Path | str | dict[str, Any]) -> dict[str, Any]:
    """All of a record but which fit has written it."""
    found = record if isinstance(record, dict) else read(record)
    return {name: value for name, value in found.items() if name not in ("fits", "run")}


def fit(callback: DifferentialPrivacy, *others: L.Callback, steps: int = 3, **options: Any) -> L.Trainer:
    one = trainer(callback, *others, max_steps=steps, **options)
    one.fit(regressor(), loader())
    return one


# --- whose the file is ------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_folder_leaves_the_first_one_its_record() -> None:
    fit(private())
    first = Path("privacy.json").read_bytes()
    fit(private(noise_multiplier=2.0), steps=5)
    fit(private(noise_multiplier=4.0), steps=7)
    assert Path("privacy.json").read_bytes() == first
    assert [(read(path)["steps"], read(path)["noise_multiplier"]) for path in records_in(Path())] == [
        (3, 1.0),
        (5, 2.0),
        (7, 4.0),
    ]
    assert [path.name for path in records_in(Path())] == ["privacy.json", "privacy-2.json", "privacy-3.json"]


def test_a_resumed_run_and_a_second_fit_go_on_in_their_own_record(tmp_path: Path) -> None:
    callback = private()
    first = fit(callback)
    first.save_checkpoint(tmp_path / "third.ckpt")
    fit(private())  # somebody else's
    again = private()
    trainer(again, max_steps=5).fit(regressor(), loader(), ckpt_path=tmp_path / "third.ckpt")
    assert [read(path)["steps"] for path in records_in(Path())] == [5, 3]
    trainer(again, max_steps=2).fit(regressor(), loader())
    assert [read(path)["steps"] for path in records_in(Path())] == [7, 3]


def test_a_branch_does_not_make_the_steps_of_the_other_forgotten(tmp_path: Path) -> None:
    """Back behind the end of a finished run: there are two records, each exact, and the later one names the other."""
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    fit(private(), saver, steps=6, enable_checkpointing=True)
    branch = private()
    trainer(branch, max_steps=4).fit(regressor(), loader(), ckpt_path=tmp_path / "ckpt" / "step=2.ckpt")
    assert branch.ledger is not None
    assert (
        branch.ledger.steps == 4
    )  # the first branch has finished: it has a statement of its own, and this one says so
    assert any("not counted here" in caveat for caveat in branch.statement().caveats)
    assert [read(path)["steps"] for path in records_in(Path())] == [6, 4]


def test_of_several_processes_one_makes_the_file(tmp_path: Path) -> None:
    records = [RunRecord(RunFolder(tmp_path)) for _ in range(8)]
    gate = threading.Barrier(len(records))

    def write(number: int) -> None:
        gate.wait()
        records[number].write({"steps": number}, "ended", {str(number): 1})

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(records))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(read(path)["steps"] for path in records_in(tmp_path)) == list(range(8))


@pytest.mark.parametrize(
    "taken", ["a folder", "a pipe", "a link to nothing", "nonsense", "far too long", "another fit's"]
)
def test_whatever_has_the_name_keeps_it(taken: str, tmp_path: Path) -> None:
    file = tmp_path / "privacy.json"
    if taken == "a folder":
        file.mkdir()
    elif taken == "a pipe":
        os.mkfifo(file)
    elif taken == "a link to nothing":
        file.symlink_to(tmp_path / "elsewhere")
    else:
        text = {"nonsense": "\x00{", "far too long": " " * (LONGEST + 1), "another fit's": '{"fits": {"a": 2, "b": 1}}'}
        file.write_text(text[taken])
    before = file.lstat()
    RunRecord(RunFolder(tmp_path)).write({"steps": 1}, "ended", {"a": 2})
    after = file.lstat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert not (tmp_path / "elsewhere").exists()
    assert read(tmp_path / name_of(2))["steps"] == 1


def test_a_file_system_without_links(tmp_path: Path) -> None:
    def link(*_: Any) -> None:
        raise OSError("no links here")

    with patched((whole_file_module.os, "link", link)):
        assert whole_file_module.create_whole(tmp_path / "file", "one")
        assert not whole_file_module.create_whole(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- what it says, and when -------------------------------------------------------------------------------------------


class Watch(L.Callback):
    """Reads the record after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.seen.append({**read("privacy.json"), "taken": trainer.global_step})


def test_while_it_runs_the_record_is_an_upper_bound() -> None:
    watch, callback = Watch(), private()
    fit(callback, watch, max_epochs=2, steps=-1, log_every_n_steps=3)
    assert callback.ledger is not None
    for record in watch.seen:
        taken, steps = record["taken"], record["steps"]
        assert record["state"] == "running"
        assert taken <= steps <= min(8, 3 * -(-taken // 3))  # up to the next step that loggers record, or the end
        assert record["epsilon"] == callback.ledger.epsilon(steps).epsilon
        assert taken == steps or any("had not ended" in caveat for caveat in record["caveats"])
    last = read("privacy.json")
    assert (last["state"], last["steps"]) == ("ended", 8)
    assert last["epsilon"] == callback.statement().epsilon
    assert not any("had not ended" in caveat for caveat in last["caveats"])


def test_an_open_number_of_steps_is_written_down_ever_more_rarely() -> None:
    watch, callback = Watch(), private()
    seen: list[int] = []
    original = RunRecord.write

    def write(self: RunRecord, statement: Any, state: str, fits: Any) -> None:
        seen.append(statement["steps"])
        original(self, statement, state, fits)

    class Stop(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 12

    with patched((RunRecord, "write", write)):
        fit(callback, watch, Stop(), steps=-1, log_every_n_steps=1)
    assert all(record["taken"] <= record["steps"] for record in watch.seen)
    assert seen[:4] == [2, 4, 6, 8]  # at least a tenth ahead
    assert (len(seen), seen[-1]) == (7, 12)


def test_the_bound_stays_within_the_budget() -> None:
    watch, callback = Watch(), private(epsilon=2.0, noise_multiplier=None)
    one = trainer(callback, watch, max_steps=4)
    one.fit(regressor(), loader())
    one.fit_loop.epoch_loop.max_steps = 30
    with pytest.warns(UserWarning, match="budget is spent"):
        one.fit(regressor(), loader())
    assert all(record["epsilon"] <= 2.0 for record in watch.seen)
    assert all(record["steps"] >= record["taken"] for record in watch.seen)


def test_a_fit_with_nothing_left_to_do_leaves_the_statement(tmp_path: Path) -> None:
    callback = private()
    saver = ModelCheckpoint(tmp_path / "ckpt", save_last=True)
    one = fit(callback, saver, enable_checkpointing=True)
    done = read("privacy.json")
    one.fit(regressor(), loader())  # a notebook's cell, run again
    assert said_in("privacy.json") == said_in(done)
    trainer(private(), max_steps=3).fit(regressor(), loader(), ckpt_path=tmp_path / "ckpt" / "last.ckpt")
    assert said_in("privacy.json") == said_in(done)
    trainer(private(), max_steps=3, default_root_dir=tmp_path / "elsewhere").fit(
        regressor(), loader(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
    )
    assert read(tmp_path / "elsewhere" / "privacy.json")["steps"] == 3
    assert done["state"] == "ended"


def test_an_error_leaves_what_was_spent() -> None:
    class Raises(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 2:
                raise RuntimeError("in mid-fit")

    with pytest.raises(RuntimeError, match="in mid-fit"):
        fit(private(), Raises())
    assert (read("privacy.json")["state"], read("privacy.json")["steps"]) == ("interrupted", 2)


def test_a_record_that_cannot_be_brought_up_to_date_is_removed_or_ends_the_run(tmp_path: Path) -> None:
    record = RunRecord(RunFolder(tmp_path))
    record.write({"steps": 1}, "running", {"a": 1})
    record.withdraw(OSError("full"))
    assert not list(tmp_path.iterdir())
    record.write({"steps": 1}, "running", {"a": 1})

    def fixed(*_: Any, **__: Any) -> None:
        raise PermissionError("fixed")

    with (
        patched((Path, "unlink", fixed)),
        pytest.raises(JournalError, match=r"privacy\.json says less than was spent.*neither replaced \(full\)"),
    ):
        record.withdraw(OSError("full"))
