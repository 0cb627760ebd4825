"""A statement is computed again from what was charged: every number that does not follow is named, and nothing else is."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import Callback

import lightning_dp.record.recompute as recompute_module
from lightning_dp import DifferentialPrivacy
from lightning_dp.cli.main import main
from lightning_dp.record.recompute import recompute
from lightning_dp.record.written import records_in
from tests.conftest import loader, regressor, trainer
from tests.guarantees.mutations import patched

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:An interrupted fit took"),
]


def private(**options: Any) -> DifferentialPrivacy:
    return DifferentialPrivacy(**{"noise_multiplier": 1.0, "delta": 1e-3, "engine": "vmap", **options})


def fit(
    folder: Path, callback: DifferentialPrivacy, *others: Callback, steps: int = 3, ckpt: Path | None = None
) -> Any:
    one = trainer(callback, *others, max_steps=steps, default_root_dir=folder)
    one.fit(regressor(), loader(), ckpt_path=ckpt)
    return one


class Raises(Callback):
    """Ends a fit in its middle."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.at:
            raise RuntimeError("in mid-fit")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was resumed under another σ, with a target that nothing comes near: two fits, two phases."""
    folder = tmp_path_factory.mktemp("run")
    fit(folder, private(max_batch_size=40)).save_checkpoint(folder / "third.ckpt")
    fit(folder, private(noise_multiplier=2.0, max_batch_size=40), steps=5, ckpt=folder / "third.ckpt")
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "copy"))


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    file = folder / "privacy.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    return file


def test_what_was_written_holds_and_every_number_is_the_same(run: Path) -> None:
    found = recompute(run / "privacy.json")
    assert (found.wrong, found.notes) == ((), ())
    said = found.record.content
    again = json.loads(found.statement.to_json())
    assert {name: said[name] for name in again if name != "caveats"} == {
        name: value for name, value in again.items() if name != "caveats"
    }
    assert found.fits == 2
    assert found.interval is None  # cut draws, of which prv-accountant has no law


def test_the_package_prv_accountant_is_a_second_opinion(tmp_path: Path) -> None:
    fit(tmp_path, private())
    found = recompute(tmp_path / "privacy.json")
    assert found.holds
    assert found.interval is not None
    assert found.interval[0] < found.statement.epsilon <= found.interval[1]
    with patched((recompute_module, "prv_accountant_interval", lambda *_: (9.0, 9.1))):
        (wrong,) = recompute(tmp_path / "privacy.json").wrong
    assert re.fullmatch(r"epsilon=.*: expected at least 9, by the package prv-accountant\.", wrong)


def lower(content: dict[str, Any], *places: str) -> None:
    for place in places[:-1]:
        content = content[place]
    content[places[-1]] *= 0.99


EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "epsilon": (lambda c: lower(c, "epsilon"), "epsilon=.*: expected at least"),
    "epsilon that is no number": (lambda c: c["risk"].update(mu="nan"), "risk.mu=nan: expected at least"),
    "risk": (lambda c: lower(c, "risk", "mu"), "risk.mu=.*: expected at least"),
    "advantage": (lambda c: lower(c, "risk", "advantage"), "risk.advantage="),
    "tests": (lambda c: lower(c, "risk", "tpr_at_fpr", "0.01"), "risk.tpr_at_fpr.0.01="),
    "reconstruction": (lambda c: c["risk"].pop("reconstruction_at_prior"), "risk.reconstruction_at_prior.0.01=None"),
    "the curve": (lambda c: lower(c, "risk", "epsilon_at_delta", "1e-05"), "risk.epsilon_at_delta.1e-05="),
    "delta": (lambda c: c.update(delta=1e-2), "delta=0.01: expected 0.001"),
    "sigma": (lambda c: c.update(noise_multiplier=3.0), "noise_multiplier=3.0: expected 2.0"),
    "q": (lambda c: lower(c, "sampling_probability"), "sampling_probability="),
    "N": (lambda c: c.update(dataset_size=6400), "dataset_size=6400: expected 64"),
    "B": (lambda c: lower(c, "expected_batch_size"), "expected_batch_size="),
    "C": (lambda c: lower(c, "clip_norm"), "clip_norm="),
    "M": (lambda c: c.update(max_batch_size=None), "max_batch_size=None: expected 40"),
    "style": (lambda c: c.update(clipping="automatic"), "clipping=automatic: expected flat"),
    "unit": (lambda c: c.update(unit="user_id"), "unit=user_id: expected example"),
    "target": (lambda c: c.update(target_epsilon=1.0), "target_epsilon=1.0: expected None"),
    "relation": (lambda c: c.update(neighbouring_relation="replace one example"), "neighbouring_relation="),
    "accountant": (lambda c: c.update(accountant="exact"), "accountant='exact': expected"),
    "a simulation": (lambda c: c.update(simulation="none"), "simulation='none': expected None"),
    "a caveat": (lambda c: c["caveats"].clear(), "caveats: expected also"),
    "randomness": (
        lambda c: c.update(randomness="reproducible"),
        "caveats: expected also 'noise and sampling were deri",
    ),
    "randomness of no kind": (lambda c: c.update(randomness="good"), "randomness='good': expected 'secret' or"),
    "steps": (lambda c: c.update(steps=4), "steps=4: expected at least 5, which the journal"),
    "more steps": (lambda c: c.update(steps=9), "steps=9: the ledger in the file has 5"),
    "the plan": (lambda c: c["plan"].update(steps=7), "run.plan=.*: expected .*, the digest of the plan"),
    "one fit": (lambda c: c["fits"].update(dict.fromkeys(c["fits"], 9)), "fits: the file counts 9 steps of"),
    "sigma of a phase": (
        lambda c: c["ledger"]["phases"][0].update(noise_multiplier=4.0),
        r"ledger: the journal has 3 steps that the file does not, with noise_multiplier=1.0 \(in the file 4.0\)",
    ),
    "steps of a phase": (
        lambda c: (c["ledger"]["phases"][0].update(steps=1), c["ledger"]["phases"][1].update(steps=4)),
        "ledger: the journal has 2 steps that the file does not",
    ),
}


@pytest.mark.parametrize("edit", EDITS)
def test_every_edit_is_named(edit: str, copy: Path) -> None:
    change, expected = EDITS[edit]
    found = recompute(edited(copy, change))
    assert not found.holds
    assert any(re.search(expected, sentence) for sentence in found.wrong), found.wrong


def test_what_is_larger_than_it_has_to_be_holds_and_is_noted(copy: Path) -> None:
    found = recompute(edited(copy, lambda c: c.update(epsilon=c["epsilon"] * 1.01)))
    assert found.holds
    assert any("an upper bound all the same: epsilon=" in note for note in found.notes)


# --- the journal -----------------------------------------------------------------------------------------------------------


def test_a_run_that_was_killed_has_an_upper_bound_and_the_journal_the_count(tmp_path: Path) -> None:
    class Keeps(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                shutil.copytree(tmp_path / "run", tmp_path / "another" / "place")

    fit(tmp_path / "run", private(), Keeps(), steps=4)
    found = recompute(tmp_path / "another" / "place" / "privacy.json")
    assert found.holds
    assert (found.record.state, found.record.steps) == ("running", 4)
    assert "the run was killed or is still running" in found.notes[0]
    missing = edited(
        tmp_path / "another" / "place", lambda c: (c.update(steps=1), c["ledger"]["phases"][0].update(steps=1))
    )
    assert any("steps=1: expected at least 2" in sentence for sentence in recompute(missing).wrong)


def test_lost_steps_and_a_second_end_are_counted_where_they_belong(tmp_path: Path) -> None:
    """Killed at step 5, resumed from 3: all 5 count, and the new ones. Back from 3 again: 3 steps have their own statement."""
    fit(tmp_path, private(), steps=3).save_checkpoint(tmp_path / "third.ckpt")
    with pytest.raises(RuntimeError, match="in mid-fit"):
        fit(tmp_path, private(), Raises(5), steps=9, ckpt=tmp_path / "third.ckpt")
    fit(tmp_path, private(), steps=7, ckpt=tmp_path / "third.ckpt")
    fit(tmp_path, private(), steps=4, ckpt=tmp_path / "third.ckpt")
    found = [recompute(file) for file in records_in(tmp_path)]
    assert [one.record.steps for one in found] == [9, 6]
    assert [one.wrong for one in found] == [(), ()]
    assert [len(one.notes) for one in found] == [1, 1]  # each names the other's last fit
    assert all("a statement of its own has to count" in one.notes[0] for one in found)


def test_a_resume_elsewhere_finds_both_journals_and_a_copy_says_what_it_cannot_see(tmp_path: Path) -> None:
    callback = private()
    one = fit(tmp_path / "version_0", callback)
    one.save_checkpoint(tmp_path / "third.ckpt")
    fit(tmp_path / "version_1", private(), steps=5, ckpt=tmp_path / "third.ckpt")
    found = recompute(tmp_path / "version_1" / "privacy.json")
    assert (found.holds, found.fits, found.statement.steps) == (True, 2, 5)
    alone = Path(shutil.copytree(tmp_path / "version_1", tmp_path / "apart" / "from" / "all"))
    with pytest.raises(ValueError, match=r"expected the line of .* in a privacy.journal .* --without-journal"):
        recompute(alone / "privacy.json")
    assert recompute(alone / "privacy.json", [tmp_path / "version_0", alone]).holds
    assert recompute(alone / "privacy.json", without_journal=True).holds

    fit(tmp_path / "copied", deepcopy(callback), steps=2)
    copied = recompute(tmp_path / "copied" / "privacy.json")
    assert (copied.holds, copied.statement.steps) == (True, 5)
    assert copied.notes == (
        "3 of the steps are of fits that the file does not name, such as those of a callback that was copied",
    )


def test_a_journal_that_was_cut_or_put_back_is_named(copy: Path) -> None:
    journal = copy / "privacy.journal"
    first, second = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    journal.write_text(second, encoding="utf-8")
    with pytest.raises(ValueError, match="expected the line of"):
        recompute(copy / "privacy.json")
    journal.write_text(
        first + second.replace("2", "9", 1), encoding="utf-8"
    )  # one count of the two: then one step more
    assert any("steps=5: expected at least 6" in sentence for sentence in recompute(copy / "privacy.json").wrong)
    journal.write_text(first + second + '{"steps": 4', encoding="utf-8")
    assert any("a line was cut off" in sentence for sentence in recompute(copy / "privacy.json").wrong)
    journal.write_text(first + second.replace('"noise_multiplier": 2.0', '"noise_multiplier": 9.0'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"privacy.journal, line 2"):
        recompute(copy / "privacy.json")


# --- other kinds of runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 3, "clipping": "quantile"},
        {"noise_multiplier": None, "epsilon": 3.0, "simulate": 2},
        {"noise_multiplier": None, "mu": 1.0},
        {"noise_multiplier": 0.0, "clip_norm": math.inf},
        {"sampling": "random_allocation", "participations": 2},
        {"sampling": "balls_in_bins"},
        {"row_wise": ["collate_fn"]},
    ],
    ids=str,
)
def test_whatever_was_run_holds(options: dict[str, Any], tmp_path: Path) -> None:
    fit(tmp_path, private(**options), steps=8)
    found = recompute(tmp_path / "privacy.json")
    assert (found.wrong, found.notes, found.statement.steps) == ((), (), 8)


def test_secure_runs_hold(tmp_path: Path) -> None:
    fit(tmp_path, private(secure=True, engine="loop"), steps=2)
    assert recompute(tmp_path / "privacy.json").holds


def test_files_of_earlier_versions_are_read(run: Path, tmp_path: Path) -> None:
    """Without run, plan and ledger; without risk; without fits; and as the first version wrote them, without a journal."""
    old = Path(shutil.copytree(run, tmp_path / "old"))
    edited(old, lambda c: [c.pop(name) for name in ("run", "plan", "ledger")])
    found = recompute(old / "privacy.json")
    assert (found.wrong, found.statement.steps, found.fits) == ((), 5, 2)
    edited(old, lambda c: c.update(neighbouring_relation="add/remove one example", epsilon=c["epsilon"] + 0.01))
    edited(old, lambda c: [c.pop(name) for name in ("risk", "fits", "state", "noise", "unit", "adaptation")])
    assert recompute(old / "privacy.json").holds
    assert not recompute(edited(old, lambda c: c.update(epsilon=c["epsilon"] / 2))).holds
    assert not recompute(edited(old, lambda c: c.update(noise_multiplier=5.0))).holds
    with pytest.raises(ValueError, match="expected a run of one σ and one q with plain Poisson sampling"):
        recompute(old / "privacy.json", without_journal=True)

    fit(tmp_path / "first", private())
    kept = ("epsilon", "delta", "target_epsilon", "accountant", "neighbouring_relation", "sampling", "caveats", "version",
            "sampling_probability", "dataset_size", "expected_batch_size", "noise_multiplier", "clip_norm", "steps",
            "randomness")  # fmt: skip
    first = edited(tmp_path / "first", lambda c: [c.pop(name) for name in list(c) if name not in kept])
    assert recompute(first).holds
    assert recompute(first, without_journal=True).holds
    assert not recompute(edited(tmp_path / "first", lambda c: lower(c, "epsilon")), without_journal=True).holds


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"steps": 3}', '{"steps": "3", "epsilon": 1, "delta": 1e-5}', "[" * 100_000, None]
)
def test_what_is_no_record_is_refused(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "privacy.json").write_text(text)
    with pytest.raises(ValueError, match=r"privacy.json: expected the privacy.json of a run"):
        recompute(tmp_path / "privacy.json")


# --- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_says_so_and_ends_with_0_or_1(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["statement", str(copy)])
    text = capsys.readouterr().out
    assert text.endswith("The statement holds.\n")
    assert "  said            ε = " in text
    assert "of 2 fits in journals" in text
    main(["statement", str(copy / "privacy.json"), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["holds"], found["wrong"], found["said"]["epsilon"]) == (True, [], found["recomputed"]["epsilon"])
    shutil.copy(copy / "privacy.json", copy / "privacy-2.json")
    edited(copy, lambda c: lower(c, "epsilon"))
    with pytest.raises(SystemExit) as ended:
        main(["statement", str(copy)])
    assert ended.value.code == 1
    text = capsys.readouterr().out
    assert "  wrong: epsilon=" in text
    assert ["hold" in line for line in text.splitlines() if line.startswith("The statement")] == [True, True]
    for words in (["nowhere"], [str(copy), "--journal", "nowhere"], [str(copy), "--journal", "a", "--without-journal"]):
        with pytest.raises(SystemExit) as ended:
            main(["statement", *words])
        assert ended.value.code == 2
    assert "--journal with --without-journal: expected one of the two" in capsys.readouterr().err


def test_the_command_needs_no_torch() -> None:
    code = "import sys; import lightning_dp.cli.statement; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
