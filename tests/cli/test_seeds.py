"""Several seeds of a recipe: counted once, taken up again, and charged as the several private runs that they are."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.cli.main import main
from lightning_dp.cli.seeds import table, take_out

RECIPE = str(Path(__file__).parents[2] / "recipes" / "digits" / "cnn_eps8.yaml")
SHORT = ["--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.enable_progress_bar=false"]


def test_runs_are_made_once_and_publishing_them_is_composed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["fit", "--config", RECIPE, *SHORT, "--seeds"]
    main([*words, "1"])
    first = (tmp_path / "seeds.jsonl").read_text(encoding="utf-8")
    main([*words, "2"])
    text = (tmp_path / "seeds.jsonl").read_text(encoding="utf-8")
    assert text.startswith(first)
    runs = [json.loads(line) for line in text.splitlines()]
    assert [one["seed"] for one in runs] == [0, 1]
    assert runs[0]["metrics"] != runs[1]["metrics"]
    said = capsys.readouterr().out
    assert said.count("seed 0, run 1") == said.count("seed 1, run 2") == 1
    accuracies = [one["metrics"]["val/accuracy"] for one in runs]
    assert f"{statistics.mean(accuracies):.4f} ± {statistics.stdev(accuracies):.4f}" in said
    spent = runs[0]["statement"]
    both = epsilon_bound([Phase(spent["noise_multiplier"], spent["sampling_probability"], 4)], spent["delta"]).epsilon
    last = said.splitlines()[-1]
    shown = float(last.split("composition: ε ≤ ")[1].split()[0])
    assert both <= shown <= 1.02 * both  # three digits, rounded up
    assert shown > runs[0]["statement"]["epsilon"] + 1


def test_without_privacy_nothing_is_said_of_it() -> None:
    one = {"metrics": {"val/accuracy": 0.5}, "statement": None, "seconds": 1.0}
    assert "ε" not in table([one, one])
    assert "±" not in table([one]).split("\n", 1)[1]


@pytest.mark.parametrize(
    "words", [["--seeds", "0"], ["--seeds=two"], ["--seeds", "2", "--seed_everything=3"], ["--seeds"]]
)
def test_what_makes_no_sense_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", RECIPE, *words])
    assert ended.value.code == 2
    assert "--seeds" in capsys.readouterr().err


def test_only_fit_is_run_several_times() -> None:
    with pytest.raises(SystemExit):
        take_out(["validate", "--config", RECIPE, "--seeds", "2"])


def test_a_run_that_fails_ends_the_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["fit", "--config", RECIPE, "--trainer.nothing=1", "--seeds", "2"])
    assert not (tmp_path / "seeds.jsonl").exists()
