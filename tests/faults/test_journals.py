"""What is believed of a journal: only what goes on from the checkpoint. The rest is counted too, or said."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_dp.record.lost_steps as lost_steps_module
from lightning_dp import DifferentialPrivacy, PreflightError
from lightning_dp.accounting import Ledger
from lightning_dp.record.checkpoint import read_with_digest, with_digest
from lightning_dp.record.journal import FILE_NAME, Journal, JournalError
from lightning_dp.record.journal_line import FitLine, read_lines
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.lost_steps import Places, count_lost
from tests.conftest import loader, regressor, trainer
from tests.faults.lives import StopAt, fork, kill_itself, life, record_releases, releases, wait
from tests.guarantees.mutations import caught, patched

KEY = "DifferentialPrivacy"
DATA = Path(__file__).parent / "data"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def lives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training killed after its 8th step, and one that took all of its 6, with the journals as they were on the way."""
    root = tmp_path_factory.mktemp("lives")

    def keep(folder: Path, step: int) -> L.Callback:
        return StopAt(step, lambda _: shutil.copy(folder / FILE_NAME, folder / f"{FILE_NAME} at {step}"))

    for name, step in (("killed", 8), ("finished", 6), ("other", 6)):
        folder = root / name
        folder.mkdir()
        end = StopAt(8, kill_itself)

        def run(folder: Path = folder, step: int = step, end: L.Callback = end) -> None:
            life(folder, None, keep(folder, 2), keep(folder, 5), end, steps=12 if step == 8 else 6)

        assert wait(fork(run, folder)) == (-signal.SIGKILL if step == 8 else 0), (folder / "life.log").read_text()[
            -2000:
        ]
    return root


@pytest.fixture
def folder(lives: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(lives / name, tmp_path / name))


def doubts(private: DifferentialPrivacy) -> list[str]:
    """Caveats that say that steps may be missing."""
    told = ("was not found", "was cut, edited", "killed, or still running, when")
    return [caveat for caveat in private.statement().caveats if any(text in caveat for text in told)]


def steps_of(private: DifferentialPrivacy) -> int:
    assert private.ledger is not None
    return private.ledger.steps


# --- what is found ----------------------------------------------------------------------------------------------------


def test_a_whole_journal_of_a_finished_fit_leaves_no_doubt(folder: Callable[[str], Path]) -> None:
    path = folder("finished")
    assert doubts(life(path, path / "ckpt" / "step=6.ckpt", steps=7)) == []


def first_line(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[0])


def edited(text: str, **changed: Any) -> str:
    line = first_line(text)
    return json.dumps({**line, **changed}) + "\n"


TAMPERED: dict[str, Callable[[Path, str], str]] = {
    "empty": lambda lives, text: "",
    "cut in the middle of its line": lambda lives, text: text[: len(text) // 2],
    "of another training": lambda lives, text: (lives / "other" / FILE_NAME).read_text(),
    "rolled back behind the checkpoint": lambda lives, text: (lives / "killed" / f"{FILE_NAME} at 2").read_text(),
    "rolled back to after the checkpoint": lambda lives, text: (lives / "killed" / f"{FILE_NAME} at 5").read_text(),
    "said to have ended": lambda lives, text: text.replace('"open" ', '"ended"', 1).replace(
        '"closed": 0', '"closed": 1'
    ),
    "without its digests": lambda lives, text: (
        json.dumps(
            {name: first_line(text)[name] for name in ("steps", "state", "fit", "training", "phase")}
            | {"state": "ended", "steps": 3}
        )
        + "\n"
    ),
    "under another name": lambda lives, text: replace(
        read_lines(lives / "killed" / FILE_NAME).lines[0], fit="0123456789abcdef"
    ).text(),
    "with other numbers": lambda lives, text: FitLine(
        first_line(text)["fit"],
        first_line(text)["training"],
        {**first_line(text)["phase"], "noise_multiplier": 9.0},
        steps=3,
        state="ended",
        closed=True,
    ).text(),
    "not there": lambda lives, text: "",
}


@pytest.mark.parametrize("kind", list(TAMPERED))
def test_lost_steps_are_counted_or_said(folder: Callable[[str], Path], lives: Path, kind: str) -> None:
    """8 steps were released, and the checkpoint holds 3 of them."""
    path = folder("killed")
    journal = path / FILE_NAME
    journal.write_text(TAMPERED[kind](lives, journal.read_text()))
    if kind == "not there":
        journal.unlink()
    private = life(path, path / "ckpt" / "step=3.ckpt", steps=5)
    assert doubts(private), private.statement().caveats
    again = life(path, path / "ckpt" / "step=5.ckpt", steps=6)  # and it stays said
    assert set(doubts(private)) <= set(doubts(again))


def test_a_journal_with_other_counts_is_refused(folder: Callable[[str], Path]) -> None:
    path = folder("killed")
    text = (path / FILE_NAME).read_text()
    (path / FILE_NAME).write_text(edited(text, steps=3, copy=[3, "open", 0, "0" * 16]))
    with pytest.raises(JournalError, match=r"privacy\.journal, line 1: .*Restore the file.*move the file away"):
        life(path, path / "ckpt" / "step=3.ckpt", steps=5)


def test_a_line_taken_out_of_the_middle_is_said(folder: Callable[[str], Path]) -> None:
    path = folder("finished")
    for _ in range(2):
        life(path, path / "ckpt" / "step=3.ckpt", steps=5)
    lines = (path / FILE_NAME).read_text().splitlines(keepends=True)
    assert len(lines) == 3
    whole = life(path, path / "ckpt" / "step=6.ckpt", steps=7)
    assert doubts(whole) == []
    assert steps_of(whole) == 6 + 1
    assert any(
        "2 other fits went on" in caveat and "4 of their steps" in caveat for caveat in whole.statement().caveats
    )
    (path / FILE_NAME).write_text(lines[0] + lines[2])
    assert doubts(life(path, path / "ckpt" / "step=6.ckpt", steps=7))


def test_presence_taken_for_content_would_be_caught(folder: Callable[[str], Path], lives: Path) -> None:
    with caught(patched_to_believe_anything()):
        test_lost_steps_are_counted_or_said(folder, lives, "empty")


@contextmanager
def patched_to_believe_anything() -> Iterator[None]:
    def believing(lineage: Any, where: Places, *, resumed: bool = True) -> Any:
        phases, after = count_lost(lineage, where, resumed=False)
        return phases, after

    import lightning_dp.record.checkpoint as checkpoint_module

    with patched((checkpoint_module, "count_lost", believing)):
        yield


# --- moments of a crash -----------------------------------------------------------------------------------------------


def test_a_write_that_was_torn_anywhere_counts_at_least_what_was_released(tmp_path: Path) -> None:
    """Step 200 was released, and the write before step 201 stopped after so many bytes, in either order."""
    line = FitLine("fit", "training", {"steps": 0})
    before, after = (replace(line, steps=steps).changing(line.head) for steps in (200, 201))
    assert len(before) == len(after)
    for cut in range(len(before) + 1):
        for torn in (after[:cut] + before[cut:], before[:cut] + after[cut:]):
            (tmp_path / FILE_NAME).write_text(replace(line, steps=200).text().replace(before, torn))
            (read,) = read_lines(tmp_path / FILE_NAME).lines
            assert 200 <= read.steps <= 202
            assert not read.closed


def test_a_step_is_written_by_one_write_in_place(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"noise_multiplier": 1.0})
    size = (tmp_path / FILE_NAME).stat().st_size
    writes: list[int] = []
    original = os.pwrite
    with patched((os, "pwrite", lambda *given: writes.append(1) or original(*given))):
        for step in range(1, 1001):
            journal.record(step)
    assert len(writes) == 1000
    assert (tmp_path / FILE_NAME).stat().st_size == size
    assert read_lines(tmp_path / FILE_NAME).lines[0].steps == 1000
    journal.close(ended=True)


def test_two_fits_that_start_in_one_folder_at_once_follow_each_other(tmp_path: Path) -> None:
    journals = [Journal(tmp_path, {"noise_multiplier": 1.0}) for _ in range(3)]
    for number, journal in enumerate(journals):
        journal.record(number + 1)
    lines = read_lines(tmp_path / FILE_NAME)
    assert lines.whole
    assert [line.steps for line in lines.lines] == [1, 2, 3]
    for journal in journals:
        journal.close(ended=False)


# --- where is written, and what is read -------------------------------------------------------------------------------


def with_journal_at(path: Path, ckpt: str, target: str) -> Path:
    """The checkpoint with another path in it, with a new digest: nothing that is written can be kept from being forged."""
    content = torch.load(path / "ckpt" / ckpt, weights_only=True)
    spent = read_with_digest(content["callbacks"][KEY])
    assert spent.lineage is not None
    forged = replace(spent, lineage=replace(spent.lineage, file=target, training="$(touch pwned)"))
    content["callbacks"][KEY] = with_digest(forged)
    torch.save(content, path / "forged.ckpt")
    return path / "forged.ckpt"


def test_a_path_in_a_checkpoint_is_neither_written_to_nor_read(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("finished")
    (path / FILE_NAME).unlink()
    start_up, pipe = tmp_path / "bashrc", tmp_path / "pipe"
    start_up.write_text("alias ll='ls -l'\n")
    os.mkfifo(pipe)
    for target in (start_up, pipe, Path("/dev/zero"), Path("/dev/stdin"), tmp_path / "new" / "file"):
        private = life(path, with_journal_at(path, "step=6.ckpt", str(target)), steps=7)
        assert doubts(private)
    assert start_up.read_text() == "alias ll='ls -l'\n"
    assert not (tmp_path / "new").exists()
    assert {line.training for line in read_lines(path / FILE_NAME).lines} == {"$(touch pwned)"}


@pytest.mark.parametrize("kind", ["link", "dangling link", "pipe", "device", "folder", "huge"])
def test_what_lies_in_place_of_the_journal_is_neither_followed_nor_waited_for(tmp_path: Path, kind: str) -> None:
    journal, target = tmp_path / FILE_NAME, tmp_path / "bashrc"
    target.write_text("alias ll='ls -l'\n")
    if kind in ("link", "dangling link"):
        journal.symlink_to(target if kind == "link" else tmp_path / "nowhere")
    elif kind == "pipe":
        os.mkfifo(journal)
    elif kind == "device":
        journal.symlink_to("/dev/zero")
    elif kind == "folder":
        journal.mkdir()
    else:
        with journal.open("wb") as file:
            file.truncate(2**40)  # no block of it is on the disk
    with pytest.raises(JournalError, match=r"privacy\.journal cannot be (read|written)"):
        life(tmp_path, steps=2)
    assert target.read_text() == "alias ll='ls -l'\n"
    assert not (tmp_path / "nowhere").exists()


def test_an_old_run_folder_is_only_read(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """As if it were read-only, also for the user root who may write everywhere."""
    path, new = folder("killed"), tmp_path / "new"
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    original = os.open

    def careful(file: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and str(file).startswith(str(path)):
            raise PermissionError(13, "Permission denied", str(file))
        return original(file, flags, *rest, **options)

    with patched((os, "open", careful)):
        private = life(new, path / "ckpt" / "step=3.ckpt", steps=5)
    assert steps_of(private) == 8 + 2
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    (line,) = read_lines(new / FILE_NAME).lines
    assert line.origin is not None
    assert (line.steps, line.origin["steps"]) == (2, 8)


# --- forks and copies -------------------------------------------------------------------------------------------------


def test_a_folder_that_was_copied_goes_on_by_itself(tmp_path: Path, lives: Path) -> None:
    """Killed after 8, copied; the copy goes on from 3 and is killed, the original is deleted; the copy goes on again."""
    original = tmp_path / "original"
    original.mkdir()

    def run(ckpt: Path | None, folder: Path, stop: int | None) -> None:
        record_releases(tmp_path)
        life(folder, ckpt, *([] if stop is None else [StopAt(stop, kill_itself)]), steps=20)

    assert wait(fork(lambda: run(None, original, 8), original)) == -signal.SIGKILL
    copy = Path(shutil.copytree(original, tmp_path / "copy"))
    third = copy / "ckpt" / "step=3.ckpt"
    assert wait(fork(lambda: run(third, copy, 9), copy)) == -signal.SIGKILL
    shutil.rmtree(original)
    private = life(copy, third, steps=20)
    made = len(releases(tmp_path)) + 17
    assert made == 8 + 6 + 17
    assert steps_of(private) >= made


@pytest.mark.parametrize("versions", [False, True])
def test_a_fork_of_a_finished_run_is_said(tmp_path: Path, versions: bool) -> None:
    """6 steps, and then from the 3rd to the 20th: 23 were released, 20 on the way of the second one.

    With a logger each fit has a folder of its own.
    """

    def fit(steps: int, ckpt: Path | None = None) -> DifferentialPrivacy:
        private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap")
        saver = L.pytorch.callbacks.ModelCheckpoint(filename="{step}", every_n_train_steps=1, save_top_k=-1)
        options = {"logger": CSVLogger(tmp_path)} if versions else {}
        fitted = trainer(
            private, saver, max_steps=steps, enable_checkpointing=True, default_root_dir=tmp_path, **options
        )
        fitted.fit(regressor(lr=0.1), loader(), ckpt_path=ckpt)
        return private

    fit(6)
    (third,) = tmp_path.rglob("step=3.ckpt")
    private = fit(20, third)
    assert steps_of(private) == 20
    assert any("another fit went on" in text and "3 of its steps" in text for text in private.statement().caveats)
    if versions:
        assert len(list(tmp_path.rglob(FILE_NAME))) == 2
        third_way = fit(21, third)  # the second continuation's version is found too
        assert any("20 of their steps" in caveat for caveat in third_way.statement().caveats)
    with caught(patched((Lineage, "notes", ()))):
        assert any("another fit went on" in text for text in fit(20, third).statement().caveats)


def test_a_fork_that_cannot_be_seen_is_said(folder: Callable[[str], Path], tmp_path: Path) -> None:
    path = folder("finished")
    life(tmp_path / "one", path / "ckpt" / "step=3.ckpt", steps=5)
    private = life(tmp_path / "two", path / "ckpt" / "step=3.ckpt", steps=5)
    assert steps_of(private) == 5
    assert any("other runs that went on from it" in caveat for caveat in private.statement().caveats)


def test_the_caveat_of_a_resume_is_not_in_the_statement_of_a_first_fit_or_of_a_second_in_one_process(
    tmp_path: Path,
) -> None:
    private = life(tmp_path, steps=3)
    assert not [caveat for caveat in private.statement().caveats if "checkpoint" in caveat]
    again = trainer(private, max_steps=2, default_root_dir=tmp_path / "elsewhere")
    again.fit(regressor(lr=0.1), loader())
    assert steps_of(private) == 5
    assert not [caveat for caveat in private.statement().caveats if "checkpoint" in caveat or "not found" in caveat]


def test_a_run_killed_before_its_first_checkpoint_is_said(tmp_path: Path) -> None:
    def run() -> None:
        private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap")
        fit = trainer(private, StopAt(4, kill_itself), max_steps=9, default_root_dir=tmp_path)
        fit.fit(regressor(lr=0.1), loader())

    assert wait(fork(run, tmp_path)) == -signal.SIGKILL
    private = life(tmp_path, steps=3)
    told = (
        "names 1 fit of another training, killed or still running when this one began: its 4 steps are not counted here"
    )
    assert any(told in caveat for caveat in private.statement().caveats)
    resumed = life(tmp_path, tmp_path / "ckpt" / "step=3.ckpt", steps=5)
    assert any(told in caveat for caveat in resumed.statement().caveats)
    assert steps_of(resumed) == 5


# --- what the first version wrote ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "ckpt", "expected"),
    [("killed", "step=3.ckpt", 8 + 7), ("finished", "step=3.ckpt", 10), ("finished", "step=6.ckpt", 10)],
)
def test_checkpoints_and_journals_of_the_first_version_go_on(
    tmp_path: Path, name: str, ckpt: str, expected: int
) -> None:
    """Its lines have no digests: their steps are counted, and the statement says that nothing proves them complete."""
    path = tmp_path / name
    (path / "ckpt").mkdir(parents=True)
    shutil.copy(DATA / name / ckpt, path / "ckpt")
    shutil.copy(DATA / name / "old.journal", path / FILE_NAME)
    private = life(path, path / "ckpt" / ckpt, steps=10)
    assert steps_of(private) == expected
    assert any("written by an earlier version" in caveat for caveat in private.statement().caveats)
    assert bool([caveat for caveat in private.statement().caveats if "killed" in caveat]) == (name == "killed")
    lines = read_lines(path / FILE_NAME)
    assert lines.whole
    assert [line.has_digest for line in lines.lines] == [False, True]


def test_the_first_version_without_its_journal_is_said(tmp_path: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    shutil.copy(DATA / "killed" / "step=3.ckpt", tmp_path / "ckpt")
    private = life(tmp_path, tmp_path / "ckpt" / "step=3.ckpt", steps=5)
    assert any("was not found" in caveat for caveat in private.statement().caveats)


def test_a_damaged_journal_of_another_version_is_no_obstacle(tmp_path: Path) -> None:
    """What lies in another run's folder may be in doubt, and does not stop this one."""
    own, other = tmp_path / "version_1", tmp_path / "version_0"
    own.mkdir()
    other.mkdir()
    (other / FILE_NAME).write_text("nonsense }\n")
    journal = Journal(own, Ledger.numbers.fget(_ledger()))
    checkpoint = journal.lineage
    journal.record(2)
    journal.close(ended=False)
    phases, after = count_lost(checkpoint, Places([own], [], [other, own]))
    assert [phase["steps"] for phase in phases] == [2]
    assert after.found
    with pytest.raises(JournalError):
        count_lost(checkpoint, Places([own, other]))


def _ledger() -> Ledger:
    from lightning_dp.plan.privacy_plan import PrivacyPlan

    return Ledger(
        PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000, expected_batch_size=100)
    )


def test_a_lineage_with_a_count_that_is_none_is_refused() -> None:
    right = asdict(Lineage("training", "file"))
    assert Lineage.read(right) == Lineage("training", "file")
    for wrong in ({"lost": -1}, {"lost": 10**400}, {"counted": {"fit": -1}}, {"unclosed": [7]}, {"heads": {"fit": 7}}):
        with pytest.raises(ValueError, match="Resume from a whole one"):
            Lineage.read({**right, **wrong})


def test_journals_are_looked_for_by_folders_alone(tmp_path: Path) -> None:
    made = trainer(default_root_dir=tmp_path)
    found = lost_steps_module.places(made, tmp_path / "a" / "b" / "x.ckpt")
    assert [*found.own] == [tmp_path, tmp_path]
    assert [*found.near] == [tmp_path / "a" / "b", tmp_path / "a"]
    with pytest.raises(PreflightError):
        read_with_digest({"ledger": {"phases": []}})
