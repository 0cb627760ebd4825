"""kill -9 at any moment: every noisy gradient that was ever made is counted, and no noise is used twice."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_dp.look.agreed as agreed_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Ledger, Phase, epsilon_bound
from lightning_dp.record.checkpoint import Spent
from lightning_dp.record.journal import FILE_NAME, Journal
from lightning_dp.record.written import records_in
from tests.faults.lives import (
    RELEASES,
    StopAt,
    checkpoints,
    fork,
    kill_itself,
    killed_life,
    life,
    record_releases,
    releases,
    wait,
)
from tests.guarantees.mutations import caught, patched

SEEDS = range(20)
STEPS = 12
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def longest(tmp_path_factory: pytest.TempPathFactory) -> float:
    """How many seconds a life takes that nobody ends, here and now."""
    folder = tmp_path_factory.mktemp("undisturbed")
    started = time.monotonic()
    assert wait(fork(lambda: (record_releases(folder), life(folder))[0], folder)) == 0
    assert len(releases(folder)) == STEPS
    return time.monotonic() - started


def check_everything_is_counted(folder: Path, private: DifferentialPrivacy, kills: int, *, exact: bool = True) -> None:
    """Every release of every life is in the last ledger; at most one step a kill was charged and not released."""
    made = releases(folder)
    assert private.ledger is not None
    assert len(made) <= private.ledger.steps
    assert private.statement().epsilon >= epsilon_bound([Phase(1.0, 16 / 64, len(made))], 1e-3).epsilon
    if exact:
        assert private.ledger.steps <= len(made) + kills
    repeated = [noise for noise, times in Counter(line["noise"] for line in made).items() if times > 1]
    assert not repeated


def check_no_record_says_too_little(folder: Path) -> None:
    """Whenever a run is killed, what lies in its folder is an upper bound (a run killed at its start has none)."""
    found = [json.loads(path.read_text()) for path in records_in(folder)]
    if not found:
        assert not releases(folder)
        return
    assert max(record["steps"] for record in found) >= len(releases(folder))
    assert (
        max(record["epsilon"] for record in found)
        >= epsilon_bound([Phase(1.0, 16 / 64, len(releases(folder)))], 1e-3).epsilon
    )


def check_every_checkpoint_counts_its_own_steps(folder: Path) -> None:
    for path in checkpoints(folder):
        found = torch.load(path, weights_only=True)
        phases = found["callbacks"]["DifferentialPrivacy"]["ledger"]["phases"]
        assert sum(phase["steps"] for phase in phases) >= found["global_step"]


@pytest.mark.parametrize("seed", SEEDS)
def test_kill_at_a_random_moment_of_training_checkpointing_and_resuming(
    tmp_path: Path, seed: int, longest: float
) -> None:
    """Two lives of an endless training are killed, the second while or after it resumes; a third ends."""
    chosen = random.Random(seed)
    randomness = {"seed": 5} if seed % 4 == 0 else {}
    for _ in range(2):
        found = checkpoints(tmp_path)
        if not found:  # killed before its first checkpoint: nothing can be resumed, and the next is a run of its own
            for name in (FILE_NAME, RELEASES, "privacy.json"):
                (tmp_path / name).unlink(missing_ok=True)
        ckpt = chosen.choice(found) if found else None
        end = killed_life(tmp_path, ckpt, kill_after=chosen.uniform(0, longest), steps=10**6, **randomness)
        assert end == -signal.SIGKILL
        check_no_record_says_too_little(tmp_path)
        check_every_checkpoint_counts_its_own_steps(tmp_path)
    found = checkpoints(tmp_path)
    ckpt = chosen.choice(found) if found else None
    kills = 2 if found else 0
    if not found:
        (tmp_path / RELEASES).unlink(missing_ok=True)
    with recorded(tmp_path):
        private = life(
            tmp_path, ckpt, steps=3 + (int(ckpt.stem.split("=")[1].split("-")[0]) if ckpt else 0), **randomness
        )
    check_everything_is_counted(tmp_path, private, kills)


@contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Like :func:`record_releases`, for this process and with an end."""
    import lightning_dp.mechanism.gaussian as gaussian_module

    with patched((gaussian_module, "add_gaussian_noise", gaussian_module.add_gaussian_noise)):
        record_releases(folder)
        yield


def killed_after(folder: Path, step: int, ckpt: Path | None = None, **options: Any) -> None:
    def run() -> None:
        record_releases(folder)
        life(folder, ckpt, StopAt(step, kill_itself), **options)

    assert wait(fork(run, folder)) == -signal.SIGKILL


def resumed_from_an_older_checkpoint(folder: Path, **options: Any) -> DifferentialPrivacy:
    """Dies after its 8th step, goes on from the 3rd, dies after the 6th, goes on from the 3rd again, to the end."""
    killed_after(folder, 8, **options)
    third = folder / "ckpt" / "step=3.ckpt"
    killed_after(folder, 6, third, **options)
    with recorded(folder):
        return life(folder, third, **options)


def check_lost_steps_are_counted(folder: Path) -> None:
    folder.mkdir()
    private = resumed_from_an_older_checkpoint(folder)
    assert len(releases(folder)) == 8 + 3 + 9
    check_everything_is_counted(folder, private, kills=2)
    assert any("8 of the steps are in no checkpoint" in caveat for caveat in private.statement().caveats)


def test_lost_steps_are_counted_once(tmp_path: Path) -> None:
    check_lost_steps_are_counted(tmp_path / "right")
    with caught(charges_are_not_written_down()):
        check_lost_steps_are_counted(tmp_path / "unwritten")
    with caught(lost_steps_are_forgotten()):
        check_lost_steps_are_counted(tmp_path / "forgotten")


@contextmanager
def charges_are_not_written_down() -> Iterator[None]:
    with patched((Journal, "record", lambda self, steps: None)):
        yield


@contextmanager
def lost_steps_are_forgotten() -> Iterator[None]:
    """The ledger of the checkpoint is all there is, as in every other library."""
    with patched((agreed_module, "with_lost_steps", lambda spent, lost: spent)):
        yield


def test_the_budget_ends_a_resumed_training_earlier_by_what_was_lost(tmp_path: Path) -> None:
    wanted: dict[str, Any] = {"noise_multiplier": None, "epsilon": 2.0}
    with pytest.warns(UserWarning, match="budget is spent"):
        private = resumed_from_an_older_checkpoint(tmp_path, **wanted)
    made = releases(tmp_path)
    assert private.ledger is not None
    assert private.plan is not None
    assert len(made) == private.ledger.steps < 8 + 3 + 9
    assert {line["noise_std"] for line in made} == {private.plan.noise_multiplier}
    assert private.statement().epsilon <= 2.0


def test_a_checkpoint_that_holds_the_lost_steps_does_not_count_them_again(tmp_path: Path) -> None:
    resumed_from_an_older_checkpoint(tmp_path)
    again = life(tmp_path, checkpoints(tmp_path)[-1], steps=14)
    assert again.ledger is not None
    assert again.ledger.steps == 8 + 3 + 9 + 2


def test_going_back_behind_the_end_of_a_finished_training_is_another_run_and_is_said(tmp_path: Path) -> None:
    life(tmp_path)
    again = life(tmp_path, tmp_path / "ckpt" / "step=3.ckpt")
    assert again.ledger is not None
    assert again.ledger.steps == STEPS
    assert any(f"{STEPS - 3} of its steps are not counted here" in caveat for caveat in again.statement().caveats)


def test_the_journal_is_found_where_the_folder_has_moved_to(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    killed_after(old, 8)
    old.rename(new)
    private = life(new, new / "ckpt" / "step=3.ckpt")
    assert private.ledger is not None
    assert private.ledger.steps == STEPS + 5


def test_a_journal_that_is_gone_is_told_in_the_statement(tmp_path: Path) -> None:
    killed_after(tmp_path, 8)
    (tmp_path / FILE_NAME).unlink()
    private = life(tmp_path, tmp_path / "ckpt" / "step=3.ckpt")
    assert any("privacy.journal of an earlier fit was not found" in text for text in private.statement().caveats)


def test_other_trainings_in_the_same_journal_do_not_count(tmp_path: Path) -> None:
    killed_after(tmp_path, 5)
    (tmp_path / "ckpt").rename(tmp_path / "of another training")
    life(tmp_path, steps=4)
    private = life(tmp_path, tmp_path / "ckpt" / "step=4.ckpt", steps=6)
    assert len((tmp_path / FILE_NAME).read_text().splitlines()) == 3
    assert private.ledger is not None
    assert private.ledger.steps == 6


# --- a known seed -----------------------------------------------------------------------------------------------------


def by_step(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["noise"]) for line in releases(folder)]


def test_a_seeded_training_does_not_repeat_the_noise_of_lost_steps(tmp_path: Path) -> None:
    private = resumed_from_an_older_checkpoint(tmp_path, seed=5)
    check_everything_is_counted(tmp_path, private, kills=2)
    assert [step for step, _ in by_step(tmp_path)] == [*range(8), *range(8, 11), *range(11, 20)]


def alone(folder: Path) -> Path:
    """A folder with a copy of the third checkpoint and nothing else: nothing there tells of the first continuation."""
    branch = folder.parent / f"{folder.name} branch"
    branch.mkdir(exist_ok=True)
    if not (branch / "step=3.ckpt").exists():
        shutil.copy(folder / "ckpt" / "step=3.ckpt", branch)
    return branch


def noise_of_a_seeded_branch_with_other_numbers(folder: Path) -> None:
    """One seed, the same steps, other numbers: (g + σ₁z, g + σ₂z) would give away g and z."""
    folder.mkdir()
    with recorded(folder):
        life(folder, seed=5)
        life(alone(folder), alone(folder) / "step=3.ckpt", seed=5, noise_multiplier=2.0)
    first, second = by_step(folder)[3:STEPS], by_step(folder)[STEPS:]
    assert [step for step, _ in first] == [step for step, _ in second]
    assert not {noise for _, noise in first} & {noise for _, noise in second}


def test_a_seeded_branch_with_other_numbers_has_other_noise(tmp_path: Path) -> None:
    noise_of_a_seeded_branch_with_other_numbers(tmp_path / "right")
    with caught(change_is_not_in_the_key()):
        noise_of_a_seeded_branch_with_other_numbers(tmp_path / "wrong")


@contextmanager
def change_is_not_in_the_key() -> Iterator[None]:
    with patched((Ledger, "changed", property(lambda self: ""))):
        yield


def test_a_seeded_branch_with_the_same_numbers_is_the_same_release(tmp_path: Path) -> None:
    """Bit for bit: nothing can be subtracted that was not known before."""
    with recorded(tmp_path):
        life(tmp_path, seed=5)
        life(alone(tmp_path), alone(tmp_path) / "step=3.ckpt", seed=5)
    made = releases(tmp_path)
    assert made[3:STEPS] == made[STEPS:]


def test_a_charge_reaches_the_journal_before_the_noise_is_drawn(tmp_path: Path) -> None:
    import lightning_dp.step.sample_release as sample_gaussian_module

    counts: list[int] = []
    original = sample_gaussian_module.release

    def release(*args: Any, **options: Any) -> Any:
        counts.append(json.loads((tmp_path / FILE_NAME).read_text())["steps"])
        return original(*args, **options)

    with patched((sample_gaussian_module, "release", release)):
        life(tmp_path, steps=5)
    assert counts == [1, 2, 3, 4, 5]


def test_what_was_spent_without_a_journal_is_taken_as_it_is() -> None:
    spent = Spent({"version": 1, "phases": []})
    assert agreed_module.with_lost_steps(spent, agreed_module.lost_since(spent, None)) == spent
