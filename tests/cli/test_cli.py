"""The command line: the accountant as a calculator, and recipes end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_dp.accounting import Phase, epsilon_bound
from lightning_dp.accounting.phase import phase_of_numbers
from lightning_dp.accounting.risk import risk_of
from lightning_dp.cli.main import main
from lightning_dp.cli.recipes import RecipeCLI, command_line
from tests.conftest import PATIENCE
from tests.nearly import assert_nearly

ROOT = Path(__file__).parents[2]
CIFAR = ["--sampling-probability", "0.08192", "--steps", "875", "--delta", "1e-5"]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(words)
    return capsys.readouterr().out


def test_epsilon_for_people_and_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    line = said(capsys, "epsilon", "--noise-multiplier", "3", *CIFAR)
    assert line.startswith("ε ≤ 3.6")
    assert "PRV" in line
    answer = json.loads(said(capsys, "epsilon", "--noise-multiplier", "3", *CIFAR, "--json"))
    assert 3.601 <= answer["epsilon"] <= 3.62


def test_the_printed_epsilon_is_never_below_the_bound(capsys: pytest.CaptureFixture[str]) -> None:
    for sigma in ("1.1", "1.3", "1.7", "2.9"):
        line = said(capsys, "epsilon", "--noise-multiplier", sigma, *CIFAR)
        bound = epsilon_bound([Phase(float(sigma), 0.08192, 875)], 1e-5).epsilon
        assert bound <= float(line.split()[2]) <= bound + 1e-3


def test_all_accountants_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["epsilon", "--noise-multiplier", "3", *CIFAR, "--all"]
    found = json.loads(said(capsys, *words, "--json"))
    assert found["epsilon_pld_low"] <= found["epsilon_prv"] <= found["epsilon_prv_accountant"] <= found["epsilon_rdp"]
    assert found["epsilon_prv"] == pytest.approx(found["epsilon_pld_high"], rel=1e-3)
    assert_nearly(found["epsilon_prv"], found["epsilon"])
    lines = said(capsys, *words).splitlines()
    assert [line.split(",")[0].strip() for line in lines[1:6]] == ["PRV", "prv-accountant", "RDP", "PLD", "PLD"]
    assert lines[-1].startswith("Whoever sees everything released and already suspects one example")
    assert found["risk"]["mu"] == risk_of([Phase(3.0, 0.08192, 875)]).mu


def test_a_plan_that_changes_on_the_way_is_composed_by_every_accountant(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["epsilon", "--noise-multiplier", "1", "2", "--sampling-probability", "0.05", "--steps", "20", "60",
             "--delta", "1e-5"]  # fmt: skip
    found = json.loads(said(capsys, *words, "--all", "--json"))
    phases = [Phase(1.0, 0.05, 20), Phase(2.0, 0.05, 60)]
    assert_nearly([found["epsilon"], found["epsilon_prv"]], [epsilon_bound(phases, 1e-5).epsilon] * 2)
    assert found["epsilon_pld_low"] <= found["epsilon_prv"] <= found["epsilon_prv_accountant"] <= found["epsilon_rdp"]
    assert found["epsilon_prv"] == pytest.approx(found["epsilon_pld_high"], rel=1e-3)
    assert max(epsilon_bound([phase], 1e-5).epsilon for phase in phases) < found["epsilon"]
    assert "σ = 1, q = 0.05, 20 steps, then σ = 2, q = 0.05, 60 steps (PRV" in said(capsys, *words)


def test_a_missing_accountant_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_dp.accounting.compare.find_spec", lambda name: None)
    told = said(capsys, "epsilon", "--noise-multiplier", "3", *CIFAR, "--all")
    assert told.count("not installed (dp-accounting)") == 2


@pytest.mark.parametrize("sampling", ["random_allocation", "balls_in_bins"])
def test_epsilon_and_calibrate_of_blocks(capsys: pytest.CaptureFixture[str], sampling: str) -> None:
    blocks = ["--sampling", sampling, "--sampling-probability", "1/12", "--steps", "25", "--delta", "1e-5"]
    found = json.loads(said(capsys, "epsilon", "--noise-multiplier", "2", *blocks, "--json", "--all"))
    assert found["accountant"] == "PLD"
    assert found["epsilon_pld_low"] is None
    assert found["epsilon"] == epsilon_bound([phase_of_numbers(2.0, 1 / 12, 36, sampling)], 1e-5).epsilon
    line = said(capsys, "epsilon", "--noise-multiplier", "2", *blocks, "--all")
    assert f"q = 0.0833333, 25 steps, {sampling.replace('_', '-')} sampling (PLD accountant)" in line
    assert "only for Poisson sampling" in line
    sigma = json.loads(said(capsys, "calibrate", "--epsilon", "2", *blocks, "--json"))["noise_multiplier"]
    assert 1.99 <= epsilon_bound([phase_of_numbers(sigma, 1 / 12, 25, sampling)], 1e-5).epsilon <= 2.0
    with pytest.raises(SystemExit):
        main(["epsilon", "--noise-multiplier", "2", *blocks[:2], "--sampling-probability", "0.3", *blocks[4:]])
    assert "expected 1/k for blocks of k steps" in capsys.readouterr().err


def test_calibrate_is_the_inverse_of_epsilon(capsys: pytest.CaptureFixture[str]) -> None:
    answer = json.loads(said(capsys, "calibrate", "--epsilon", "8", *CIFAR, "--json"))
    assert epsilon_bound([Phase(answer["noise_multiplier"], 0.08192, 875)], 1e-5).epsilon <= 8.0
    assert answer["noise_multiplier"] == pytest.approx(1.641, rel=5e-3)
    assert said(capsys, "calibrate", "--epsilon", "8", *CIFAR).startswith("σ = 1.64")


def test_infinite_epsilon_is_json_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "epsilon", "--noise-multiplier", "0", *CIFAR, "--json")
    assert json.loads(text, parse_constant=lambda constant: pytest.fail(constant))["epsilon"] == "inf"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["epsilon", "--noise-multiplier", "-1", *CIFAR], "noise_multiplier=-1.0"),
        (["epsilon", "--noise-multiplier", "1", *CIFAR[:-1], "2"], "delta=2.0"),
        (
            ["epsilon", "--noise-multiplier", "1", "--sampling-probability", "1.5", *CIFAR[2:]],
            "sampling_probability=1.5",
        ),
        (["epsilon", "--noise-multiplier", "1", *CIFAR[:2], "--steps", "-3", *CIFAR[4:]], "steps=-3"),
        (["epsilon", "--noise-multiplier", "1", "2", "3", *CIFAR[:3], "5", "6", *CIFAR[4:]], "steps=5 6"),
        (["epsilon", "--noise-multiplier", "1", "-2", *CIFAR], "noise_multiplier=-2.0"),
        (["calibrate", "--epsilon", "0", *CIFAR], "epsilon=0.0"),
        (["calibrate", "--epsilon", "1e-7", *CIFAR[:2], "--steps", "1000000", "--delta", "1e-12"], "epsilon=1e-07"),
    ],
)
def test_bad_numbers(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "xpected" in error


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_the_overview_names_every_command(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-dp"])
    out = said(capsys, *words)
    for command in ("fit", "validate", "test", "predict", "epsilon", "calibrate"):
        assert command in out


NUMBERS = ("--sampling-probability", "0.1", "--steps", "10", "--delta", "1e-5")
SLOW = (
    "torch", "lightning", "prv_accountant", "scipy.stats", "scipy.signal", "scipy.optimize", "scipy.linalg", "scipy.integrate",
)  # fmt: skip
"""What takes longest to import. What a calculator's answer takes is next to nothing beside it."""


@pytest.mark.parametrize(
    ("words", "slow"),
    [
        (("--version",), (*SLOW, "numpy", "scipy")),
        (("--help",), (*SLOW, "numpy", "scipy")),
        (("epsilon", "--noise-multiplier", "1", *NUMBERS), SLOW),
        (("calibrate", "--epsilon", "3", *NUMBERS), SLOW),
        (("calibrate", "--epsilon", "3", *NUMBERS, "--sampling", "random_allocation"), SLOW),
    ],
    ids=lambda value: " ".join(value[:1] + value[-1:]) if isinstance(value, tuple) else "",
)
def test_a_command_imports_what_it_needs(words: tuple[str, ...], slow: tuple[str, ...]) -> None:
    code = (
        f"import sys; from lightning_dp.cli.main import main; main({list(words)}); "
        f"print(*[name for name in {list(slow)} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stderr.split()) == (0, [])


RECIPE = ROOT / "recipes" / "digits" / "cnn_eps8.yaml"


def commands(folder: Path) -> dict[str, list[str]]:
    """Name of a run → its command line."""
    named = yaml.safe_load(RECIPE.read_text())
    named["trainer"].update(
        strategy="private", max_steps=2, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    (folder / "named.yaml").write_text(yaml.safe_dump(named))
    misspelt = yaml.safe_load(RECIPE.read_text())
    misspelt["trainer"]["callbacks"][0]["init_args"]["epsilom"] = 1.0
    (folder / "misspelt.yaml").write_text(yaml.safe_dump(misspelt))
    return {
        "audit": ["audit", "--config", str(RECIPE), "--trainer.max_steps=3", "--json",
                  "--gradient-canaries=200", "--input-canaries=4", "--seed=0"],
        "misspelt": ["fit", "--config", str(folder / "misspelt.yaml")],
        "named": ["fit", "--config", str(folder / "named.yaml")],
        "trains": ["fit", "--config", str(RECIPE), "--trainer.max_steps", "4", "--trainer.val_check_interval", "2",
                   "--trainer.logger.init_args.save_dir", "."],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Each of the commands, run from an empty folder in one fresh process: (code, stdout, stderr, the folder)."""
    folder = tmp_path_factory.mktemp("commands")
    for name, words in commands(folder).items():
        (folder / name).mkdir()
        (folder / name / "words.json").write_text(json.dumps(words))
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.served", str(folder)],
        cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]

    def of(name: str) -> tuple[int, str, str, Path]:
        code, stdout, stderr = ((folder / name / file).read_text() for file in ("code", "stdout", "stderr"))
        return int(code), stdout, stderr, folder / name / "here"

    return of


def test_a_recipe_trains_and_ends_with_statement_and_metrics(ran: Any) -> None:
    """``python -m lightning_dp`` from an empty folder, as a new user would, with fewer steps."""
    code, stdout, stderr, folder = ran("trains")
    assert code == 0, stderr[-3000:]
    assert ")-DP, add/remove one example with N public, Poisson sampling" in stderr + stdout
    assert "Last validation, after 4 steps: val/accuracy = " in stdout
    statement = json.loads(next(folder.rglob("privacy.json")).read_text())
    assert statement["epsilon"] <= 8.0
    assert statement["steps"] == 4
    assert "val/accuracy" in next(folder.rglob("metrics.csv")).read_text()


def test_the_strategy_can_be_named_in_yaml(ran: Any) -> None:
    code, _, stderr, folder = ran("named")
    assert code == 0, stderr[-3000:]
    (statement,) = folder.rglob("privacy*.json")
    assert json.loads(statement.read_text())["steps"] == 2


def test_an_unknown_key_in_a_recipe_is_an_error(ran: Any) -> None:
    code, _, stderr, _ = ran("misspelt")
    assert code == 2
    assert "epsilom" in stderr


def test_a_recipe_is_audited(ran: Any) -> None:
    code, stdout, stderr, folder = ran("audit")
    assert code == 0, stderr[-3000:]
    found = json.loads(stdout.splitlines()[-1])
    assert found["verdict"] == "consistent"
    assert found["epsilon_lower"] < found["epsilon_claimed"] <= 8
    assert found["confidence"] == 0.95
    assert not list(folder.iterdir())


def test_an_audit_without_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["audit"])
    assert ended.value.code == 2
    assert "--config" in capsys.readouterr().err


@pytest.mark.parametrize("there", [True, False])
def test_a_recipe_sets_the_precision_of_products_where_there_is_a_gpu(
    there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    monkeypatch.setattr("torch.set_float32_matmul_precision", told.append)
    words = ["--model", "tests.conftest.Regressor", "--trainer.accelerator", "cpu", "--seed_everything", "0"]
    words += ["--trainer.logger", "false"]
    with command_line([*words, "--matmul_precision", "high"]):
        RecipeCLI(run=False, save_config_callback=None)
    assert told == ["high"] * there
    with command_line(words):
        RecipeCLI(run=False, save_config_callback=None)
    assert told == ["high"] * there
