"""A checkpoint that is torn, edited, foreign or a bomb is refused by name; what it held is never guessed or run."""

from __future__ import annotations

import copy
import os
import pickle
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_dp import PreflightError
from lightning_dp.record.journal import FILE_NAME, JournalError
from lightning_dp.record.journal_line import read_lines
from tests.faults.lives import life

pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
]
KEY = "DifferentialPrivacy"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    life(folder, steps=3)
    return (folder / "ckpt" / "step=3.ckpt").read_bytes()


def refusal(path: Path) -> str:
    with pytest.raises(PreflightError) as refused:
        life(path.parent, path, steps=5)
    return str(refused.value)


@pytest.mark.parametrize("seed", range(6))
def test_a_torn_checkpoint_is_refused_by_name(tmp_path: Path, whole: bytes, seed: int) -> None:
    chosen = random.Random(seed)
    size = 0 if seed == 0 else chosen.randrange(1, len(whole))
    path = tmp_path / "torn.ckpt"
    path.write_bytes(whole[:size])
    said = refusal(path)
    assert said.startswith(f"ckpt_path={path} cannot be read")
    assert "expected a whole checkpoint" in said
    assert "Resume from another checkpoint" in said


def test_flipped_bytes_are_refused_or_change_nothing_that_counts(tmp_path: Path, whole: bytes) -> None:
    """The ledger lies in the pickle part; a digest notices what torch's own checks let through."""
    place = whole.index(b"noise_multiplier") + len(b"noise_multiplier")
    tried = 0
    for offset in range(place, place + 60, 12):
        damaged = bytearray(whole)
        damaged[offset] ^= 0x10
        path = tmp_path / "flipped.ckpt"
        path.write_bytes(damaged)
        refusal(path)
        tried += 1
    assert tried == 5


class Bomb:
    """Runs code on being unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("place", ["anywhere", "ledger", "alone"])
def test_a_pickle_bomb_does_not_go_off(tmp_path: Path, whole: bytes, place: str) -> None:
    path, crater = tmp_path / "bomb.ckpt", tmp_path / "crater"
    (tmp_path / "whole.ckpt").write_bytes(whole)
    content = torch.load(tmp_path / "whole.ckpt", weights_only=True)
    if place == "anywhere":
        content["extra"] = Bomb(crater)
    elif place == "ledger":
        content["callbacks"][KEY]["ledger"] = Bomb(crater)
    if place == "alone":
        path.write_bytes(pickle.dumps(Bomb(crater)))
    else:
        torch.save(content, path)
    assert "not unpickled since that runs code" in refusal(path)
    assert not crater.exists()
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists()  # it was live


@pytest.mark.parametrize("content", [[], {}, {"state_dict": 3}, torch.zeros(2)])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    assert "expected a checkpoint of Lightning" in refusal(tmp_path / "other.ckpt")


def test_a_missing_file_stays_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        life(tmp_path, tmp_path / "nowhere.ckpt")


def edited(whole: bytes, tmp_path: Path, edit: Any) -> Path:
    path = tmp_path / "edited.ckpt"
    path.write_bytes(whole)
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    return path


def test_a_ledger_with_a_new_digest_must_still_hold_the_steps_of_the_weights(tmp_path: Path, whole: bytes) -> None:
    from lightning_dp.record.checkpoint import Spent, with_digest

    def fewer(content: dict[str, Any]) -> None:
        ledger = copy.deepcopy(content["callbacks"][KEY]["ledger"])
        ledger["phases"][0]["steps"] = 2
        content["callbacks"][KEY] = with_digest(Spent(ledger))

    said = refusal(edited(whole, tmp_path, fewer))
    assert said.startswith("global_step=3 in a checkpoint whose ledger counts 2 steps")


@pytest.mark.parametrize("value", ["3", -1, 2.5, None, True])
def test_a_nonsensical_step_count_is_refused(tmp_path: Path, whole: bytes, value: Any) -> None:
    assert f"global_step={value!r}" in refusal(
        edited(whole, tmp_path, lambda content: content.update(global_step=value))
    )


@pytest.mark.parametrize(
    "line",
    [
        '{"steps": -3, "state": "open", "fit": "a", "training": "b", "phase": {}}',
        '{"steps": 3.5, "state": "open", "fit": "a", "training": "b", "phase": {}}',
        '{"steps": 3, "state": "over", "fit": "a", "training": "b", "phase": {}}',
        '{"steps": 3, "state": "open", "fit": "a", "training": "b"}',
        '{"steps": 3, "state": "open", "fit": "a", "training": "b", "phase": 7}',
        "[" * 100_000 + "}",
        "a line of something else }",
        "{}",
    ],
)
def test_an_edited_journal_is_refused_by_file_and_line(tmp_path: Path, line: str) -> None:
    life(tmp_path, steps=3)
    with (tmp_path / FILE_NAME).open("a") as journal:
        journal.write(line + "\n")
    with pytest.raises(JournalError, match=r"privacy\.journal, line 2: .*expected the line of a fit.*Restore"):
        life(tmp_path, tmp_path / "ckpt" / "step=3.ckpt", steps=5)


def test_a_phase_that_is_none_is_refused_with_the_remedy(tmp_path: Path) -> None:
    life(tmp_path, steps=3)
    (line,) = read_lines(tmp_path / FILE_NAME).lines
    forged = replace(line, state="open", phase={**line.phase, "noise_multiplier": "1"})  # with digests that fit
    (tmp_path / FILE_NAME).write_text(forged.text())
    with pytest.raises(ValueError, match=r"noise_multiplier='1' in the ledger's state: expected a plain number"):
        life(tmp_path, tmp_path / "ckpt" / "step=2.ckpt", steps=5)
