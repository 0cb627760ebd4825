"""Whatever ends a fit (an error, no memory, a signal, a full disk): what it released is counted, and it is said."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment

import lightning_dp.record.journal as journal_module
import lightning_dp.record.whole_file as whole_file_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.record.journal import FILE_NAME, JournalError
from tests.conftest import Regressor, loader, regressor, trainer
from tests.faults.lives import StopAt, fork, life, record_releases, releases, wait
from tests.guarantees.mutations import patched

STATEMENT = "privacy.json"
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
]


class Raises(Regressor):
    """Its training_step raises in the fifth step, as if the data did it."""

    def __init__(self, error: Callable[[], BaseException]) -> None:
        super().__init__(lr=0.1)
        self.error = error

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 4:
            raise self.error()
        return super().training_step(batch, batch_idx)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "exception": lambda: RuntimeError("a broken example"),
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "no memory": lambda: MemoryError(),
    "ctrl-c": lambda: KeyboardInterrupt(),
}


@pytest.mark.parametrize("kind", list(ERRORS))
def test_an_error_inside_a_step_leaves_the_budget_of_the_steps_before(tmp_path: Path, kind: str) -> None:
    expected = SystemExit if kind == "ctrl-c" else type(ERRORS[kind]())
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(expected):
            life(tmp_path, module=Raises(ERRORS[kind]))
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning switches it off on the way out
    assert json.loads((tmp_path / STATEMENT).read_text())["steps"] == 4
    assert json.loads((tmp_path / FILE_NAME).read_text())["steps"] == 4
    again = life(tmp_path, tmp_path / "ckpt" / "step=2.ckpt")
    assert again.ledger is not None
    assert again.ledger.steps == 2 + 2 + 10


def test_sigterm_ends_after_a_step_and_everything_is_counted(tmp_path: Path) -> None:
    """Lightning's own answer to a preemption: the step is finished, then SIGTERMException goes through the hooks."""

    def run() -> None:
        record_releases(tmp_path)
        life(tmp_path, None, StopAt(4, lambda _: os.kill(os.getpid(), signal.SIGTERM)), steps=50)

    assert wait(fork(run, tmp_path)) == 0  # SIGTERMException is a SystemExit
    made = len(releases(tmp_path))
    assert made == 4
    assert json.loads((tmp_path / STATEMENT).read_text())["steps"] == made
    assert json.loads((tmp_path / FILE_NAME).read_text())["state"] == "open"


def test_slurm_saves_a_checkpoint_that_has_counted_everything(tmp_path: Path) -> None:
    """On the requeue signal Lightning saves hpc_ckpt_1.ckpt in the middle of whatever happens; the next job finds it."""

    def job(name: str, steps: int, *callbacks: L.Callback) -> Callable[[], None]:
        def run() -> None:
            os.environ.update(SLURM_JOB_ID=name, SLURM_JOB_NAME="train", SLURM_NTASKS="1")
            with patched((SLURMEnvironment, "detect", staticmethod(lambda: True))):
                record_releases(tmp_path)
                private = DifferentialPrivacy(noise_multiplier=1.0, delta=1e-3, engine="vmap")
                fit = trainer(
                    private, *callbacks, max_steps=steps, default_root_dir=tmp_path,
                    plugins=[SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)],
                )  # fmt: skip
                fit.fit(regressor(lr=0.1), loader())

        return run

    def requeue(_: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def preempt(_: L.Trainer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    first = fork(job("1", 50, StopAt(4, requeue), StopAt(7, preempt)), tmp_path)
    assert wait(first) == -signal.SIGKILL, (tmp_path / "life.log").read_text()[-3000:]
    assert (tmp_path / "hpc_ckpt_1.ckpt").exists(), (tmp_path / "life.log").read_text()[-2000:]
    assert wait(fork(job("1", 9), tmp_path)) == 0, (tmp_path / "life.log").read_text()[-2000:]
    made = len(releases(tmp_path))
    assert made == 7 + (9 - 4)
    assert json.loads((tmp_path / STATEMENT).read_text())["steps"] == made


# --- a full disk ------------------------------------------------------------------------------------------------------


def no_room(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_end_leaves_the_statement_in_the_message_and_the_last_checkpoint(tmp_path: Path) -> None:
    full = patched((whole_file_module.os, "replace", no_room))
    with pytest.warns(UserWarning, match=r"privacy\.json cannot be written .*No space left") as told, full:
        private = life(tmp_path, steps=3)
    said = next(str(one.message) for one in told if "cannot be written" in str(one.message))
    assert json.loads(said[said.index("{") :])["epsilon"] == private.statement().epsilon
    assert (tmp_path / "ckpt" / "step=3.ckpt").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".part"]


def test_a_full_disk_does_not_hide_the_error_that_ended_the_run(tmp_path: Path) -> None:
    with (
        pytest.warns(UserWarning, match="cannot be written"),
        pytest.raises(RuntimeError, match="a broken example"),
        patched((whole_file_module.os, "replace", no_room)),
    ):
        life(tmp_path, module=Raises(ERRORS["exception"]))


def test_an_old_statement_stays_whole_or_goes_but_is_never_half_written(tmp_path: Path) -> None:
    file = tmp_path / "one" / "file"
    whole_file_module.write_whole(file, "old")
    for step in ("replace", "fsync"):
        with patched((whole_file_module.os, step, no_room)), pytest.raises(OSError, match="No space"):
            whole_file_module.write_whole(file, "new" * 1000)
        assert [path.name for path in file.parent.iterdir()] == ["file"]
        assert file.read_text() == "old"
    whole_file_module.write_whole(file, "new")
    assert file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_full_disk_before_the_first_step_is_refused(tmp_path: Path) -> None:
    with (
        patched((journal_module.os, "write", lambda descriptor, content: 7)),
        pytest.raises(JournalError, match=r"privacy\.journal cannot be written \(.*No space left.*expected a folder"),
    ):
        life(tmp_path)
    assert json.loads((tmp_path / STATEMENT).read_text())["steps"] == 0


def test_a_step_that_cannot_be_written_down_is_not_released(tmp_path: Path) -> None:
    def run() -> None:
        record_releases(tmp_path)
        original = os.pwrite

        def pwrite(descriptor: int, content: bytes, offset: int) -> int:
            return no_room() if content.startswith(b"4 ") else original(descriptor, content, offset)

        os.pwrite = pwrite
        life(tmp_path)

    assert wait(fork(run, tmp_path)) == 1
    assert "JournalError" in (tmp_path / "life.log").read_text()
    assert len(releases(tmp_path)) == 3
    assert json.loads((tmp_path / STATEMENT).read_text())["steps"] == 4  # charged, and not released: the safe way round


def test_a_line_that_the_full_disk_cut_off_does_not_spoil_the_journal(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"steps": 0      , "state": "op')
    life(tmp_path, steps=3)
    again = life(tmp_path, tmp_path / "ckpt" / "step=2.ckpt", steps=4)
    assert not [caveat for caveat in again.statement().caveats if "was cut" in caveat]
    assert again.ledger is not None
    assert again.ledger.steps == 4
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 3


def test_no_journal_and_no_statement_in_a_dry_run(tmp_path: Path) -> None:
    private = DifferentialPrivacy(noise_multiplier=1.0, engine="vmap")
    trainer(private, fast_dev_run=2).fit(regressor(), loader())
    assert not list(tmp_path.iterdir())
