"""What a user vouches for stays in the statement: the steps that rested on it are spent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import default_collate

from lightning_dp import DifferentialPrivacy
from lightning_dp.accounting import Assumptions, Ledger
from lightning_dp.accounting.entry import Entry
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record.journal import Journal
from lightning_dp.record.lost_steps import Places, count_lost
from tests.conftest import loader, regressor, trainer

VOUCHED: dict[str, Any] = {"row_wise": ["collate_fn"], "public_state": ["teacher", "centre"]}
PLAN = PrivacyPlan(noise_multiplier=2.0, clip_norm=1.0, delta=1e-5, dataset_size=1000, expected_batch_size=100)


def collate(rows: list[Any]) -> Any:
    return default_collate(rows)


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "physical_batch_size": 64, **options})


def said(callback: DifferentialPrivacy) -> list[str]:
    return [caveat for caveat in callback.statement().caveats if caveat.startswith("the user")]


NOW = ["the user vouches for collate_fn: each row", "the user declares teacher, centre public: what hooks"]
BEFORE = [
    "the user vouched for collate_fn in 2 steps of earlier fits: each row",
    "the user declared teacher, centre public in 2 steps of earlier fits: what hooks",
]


def test_it_outlives_a_resume_without_it(tmp_path: Path) -> None:
    first = private(**VOUCHED)
    fit = trainer(first, max_steps=2, default_root_dir=tmp_path)
    fit.fit(regressor(), loader(collate_fn=collate))
    assert [caveat[: len(text)] for caveat, text in zip(said(first), NOW, strict=True)] == NOW
    fit.save_checkpoint(tmp_path / "2.ckpt")
    second = private()
    fit = trainer(second, max_steps=3, default_root_dir=tmp_path)
    fit.fit(regressor(), loader(collate_fn=collate), ckpt_path=str(tmp_path / "2.ckpt"))
    assert [caveat[: len(text)] for caveat, text in zip(said(second), BEFORE, strict=True)] == BEFORE
    fit.save_checkpoint(tmp_path / "3.ckpt")
    third = private(row_wise=["collate_fn"])
    fit = trainer(third, max_steps=4, default_root_dir=tmp_path)
    fit.fit(regressor(), loader(collate_fn=collate), ckpt_path=str(tmp_path / "3.ckpt"))
    both = [NOW[0], BEFORE[1]]
    assert [caveat[: len(text)] for caveat, text in zip(said(third), both, strict=True)] == both


def test_steps_that_only_a_journal_has_rest_on_it_too(tmp_path: Path) -> None:
    ledger = Ledger(PLAN, Assumptions(("collate_fn",)))
    journal = Journal(tmp_path, ledger.numbers)
    checkpoint = journal.lineage
    journal.record(3)
    journal.close()
    phases, _ = count_lost(checkpoint, Places([tmp_path]))
    after = Ledger.resume(PLAN, {**ledger.state_dict(), "phases": phases})
    assert any("vouched for collate_fn in 3 steps" in note for note in after.notes)


def test_it_is_a_stretch_of_its_own_and_costs_nothing() -> None:
    first = Ledger(PLAN, Assumptions(("collate_fn",)))
    first.charge()
    second = Ledger.resume(PLAN, first.state_dict())
    second.charge()
    assert [phase["row_wise"] for phase in second.state_dict()["phases"]] == [["collate_fn"], []]
    assert second.changed == ""
    assert len(second.phases) == 1
    plain = Ledger(PLAN)
    plain.charge()
    plain.charge()
    assert second.epsilon() == plain.epsilon()


def test_what_did_not_know_of_it_is_read() -> None:
    old = {name: value for name, value in Ledger(PLAN).numbers.items() if name not in VOUCHED}
    assert Entry.read({**old, "steps": 3}).assumed == Assumptions()


@pytest.mark.parametrize("wrong", ["collate_fn", [1], [""], None, {"collate_fn": 1}, ["x"] * 1001])
def test_what_nobody_writes_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"row_wise=.*expected a list of names"):
        Entry.read({**Ledger(PLAN).numbers, "row_wise": wrong})


def test_another_word_is_another_run_of_a_known_seed(tmp_path: Path) -> None:
    """Two continuations of a checkpoint that sum other gradients must not share their noise."""
    fit = trainer(private(seed=1), max_steps=2, default_root_dir=tmp_path)
    fit.fit(regressor(), loader(collate_fn=collate))
    fit.save_checkpoint(tmp_path / "2.ckpt")
    courses = []
    for more in ({}, {"row_wise": ["collate_fn"]}, {"public_state": ["collate_fn"]}):
        callback = private(seed=1, **more)
        fit = trainer(callback, max_steps=3, default_root_dir=tmp_path / str(len(courses)))
        fit.fit(regressor(), loader(collate_fn=collate), ckpt_path=str(tmp_path / "2.ckpt"))
        assert callback.ledger is not None
        courses.append(callback.ledger.course)
    assert len(set(courses)) == 3
