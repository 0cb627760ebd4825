"""Recipes by name, files on their bases, and errors that are one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_dp.cli.fit_help import arguments
from lightning_dp.cli.main import main
from lightning_dp.cli.recipe_files import copy, expanded, find, folder, layers, names

ROOT = Path(__file__).parents[2]


def ended(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with code 2: one line."""
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lightning-dp: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_every_recipe_has_a_name_and_is_whole_by_itself() -> None:
    """Alone it names a strategy that refuses to train without privacy, or is not private by its name."""
    assert len(names()) == len([p for p in folder().glob("*/*.yaml") if p.parent.name not in ("shared", "launch")])
    for name in names():
        merged: set[str] = set()
        for path in layers(find(name)):
            merged |= set(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert {"model", "data", "trainer", "seed_everything"} <= merged, name


def test_a_name_a_file_and_data_become_options_of_lightning_cli() -> None:
    recipe = folder() / "cifar10" / "wrn_16_4_eps8.yaml"
    files = [folder() / "shared" / "cifar10.yaml", folder() / "shared" / "wrn_16_4.yaml", recipe]
    configs = [word for file in files for word in ("--config", str(file))]
    assert expanded(["fit", "--recipe", "cifar10/wrn_16_4_eps8"]) == ["fit", *configs]
    assert expanded(["fit", f"--config={recipe}", "--trainer.max_steps", "2"]) == [
        "fit", *configs, "--trainer.max_steps", "2",
    ]  # fmt: skip
    assert expanded(["fit", "--data", str(ROOT)]) == ["fit", "--data.init_args.root", str(ROOT)]
    assert expanded(["fit", "--data", "lightning_dp.data.CIFARDataModule"])[1] == "--data"
    assert expanded(["fit", "--config", "trainer: {max_steps: 2}"]) == ["fit", "--config", "trainer: {max_steps: 2}"]
    assert expanded(["fit", "--ckpt_path", "last"]) == ["fit", "--ckpt_path", "last"]


@pytest.mark.parametrize("word", ["{}=null", "{} null"])
def test_null_is_nothing_at_any_depth(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    """jsonargparse makes the string 'None' of a ``null`` for an argument of an argument."""
    shallow = word.format("--data.init_args.cache_dir").split()
    deep = word.format("--data.init_args.features.init_args.init_from").split()
    assert expanded(["fit", *shallow]) == ["fit", *shallow]
    with pytest.raises(SystemExit) as end:
        main(["fit", "--recipe", "cifar10/efficientnet_lite_last_eps1", *shallow, *deep, "--print_config"])
    assert not end.value.code
    data = yaml.safe_load(capsys.readouterr().out)["data"]["init_args"]
    assert data["cache_dir"] is None
    assert data["features"]["init_args"]["init_from"] is None
    assert data["features"]["init_args"]["size"] == 192, "the rest is as the recipe has it"


def test_a_list_of_recipes_may_be_cut_short() -> None:
    command = [sys.executable, "-m", "lightning_dp", "recipes"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""


def test_a_base_below_another_comes_first_and_once() -> None:
    rungs = [path.name for path in layers(find("cifar10/ablation_3_weight_standardisation_eps8"))]
    assert rungs[:2] == ["cifar10.yaml", "wrn_16_4_ablation.yaml"]
    assert [name.split("_")[1] for name in rungs[2:]] == ["1", "2", "3"]


def test_a_copy_is_the_same_recipe_elsewhere_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["recipes", "copy", "cifar10/wrn_16_4_eps8", str(tmp_path)])
    copied = tmp_path / "cifar10" / "wrn_16_4_eps8.yaml"
    assert f"lightning-dp fit --config {copied}" in capsys.readouterr().out
    assert [path.read_text() for path in layers(copied)] == [
        path.read_text() for path in layers(find("cifar10/wrn_16_4_eps8"))
    ]
    assert all(path.is_relative_to(tmp_path) for path in layers(copied))
    copy("cifar10/wrn_16_4_eps8", tmp_path)  # nothing was changed: nothing is lost
    copied.write_text(copied.read_text() + "\n# mine\n")
    assert "is there already and differs" in ended(["recipes", "copy", "cifar10/wrn_16_4_eps8", str(tmp_path)], capsys)
    assert copied.read_text().endswith("# mine\n")


def test_recipes_are_listed_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == names()
    assert all(len(line.split()) > 3 for line in listed)
    main(["recipes", "list", "digits"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    main(["recipes", "show", "cifar10/wrn_16_4_eps8"])
    shown = capsys.readouterr().out
    assert "# ---- shared/cifar10.yaml" in shown
    assert yaml.safe_load((find("cifar10/wrn_16_4_eps8")).read_text())["trainer"]["max_steps"] == 2468
    assert "max_steps: 2468" in shown


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti"], "Did you mean fit?"),
        (["recipes", "show", "digits/cnn_eps9"], "Did you mean digits/cnn_eps8 or"),
        (["fit", "--recipe", "cifar10/wrn_16_4_epz8"], "Did you mean cifar10/wrn_16_4_eps8"),
        (["fit", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)."),
        (["fit", "--config", "elsewhere/digits/cnn_eps8.yaml"], "Did you mean digits/cnn_eps8"),
        (["fit", "--config", "."], "cannot be read"),
        (["fit", "--recipe"], "recipe '': there is none of that name"),
        (["verify", "--recipe", "digits/cnn_eps9"], "Did you mean digits/cnn_eps8 or"),
        (["audit", "--config", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["fit", "--ckpt_path", "nowhere.ckpt"], "--ckpt_path nowhere.ckpt: expected a checkpoint that is there."),
    ],
)
def test_what_is_not_there_is_said_before_pytorch_is_imported(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] not in ("audit", "verify"):
        monkeypatch.setitem(sys.modules, "lightning_dp.cli.recipes", None)
    assert expected in ended(words, capsys)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("bases: [me.yaml]", "expected bases that are not laid on it in turn"),
        ("bases: me.yaml", "expected a list of files"),
        ("bases: [1]", "expected a list of files"),
        ("bases: [nowhere.yaml]", "nowhere.yaml: cannot be read"),
        ("a: [", "no YAML: "),
        ("- 1", "expected a YAML file of settings"),
        ("", "expected a YAML file of settings"),
    ],
)
def test_bases_that_make_no_sense(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "me.yaml").write_text(text)
    assert expected in ended(["fit", "--config", str(tmp_path / "me.yaml")], capsys)


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        (
            "trainer: {callbacks: [{class_path: lightning_dp.DifferentialPrivacy, init_args: {epsilon: -8}}]}",
            [],
            "epsilon=-8.0: expected a finite number above 0, such as 8.0.",
        ),
        (
            "trainer: {callbacks: [{class_path: lightning_dp.DifferentialPrivacy, init_args: {epsilom: 8}}]}",
            [],
            "Option 'epsilom' is not accepted. Did you mean epsilon?",
        ),
        ("trainer: {max_stepps: 3}", [], "Did you mean trainer.max_steps"),
        ("model: {class_path: lightning_dp.models.DigitCNN}", [], "Did you mean DigitsCNN"),
        ("data: {init_args: {batch_size: 0}}", [], "batch_size=0: expected at least 1."),
        ("trainer: {max_steps: 3}", ["--trainer.max_stesp", "3"], "Did you mean trainer.max_steps"),
        ("trainer: {max_steps: 3}", ["--trainer.max_steps", "ten"], "Expected int. Got value: ten."),
        ("trainer: {max_steps: 3}", ["--data", str(ROOT)], "Option 'root' is not accepted."),
    ],
)
def test_a_mistake_in_a_recipe_is_one_sentence(
    text: str, words: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"bases: [{find('digits/cnn_eps8')}]\n{text}\n")
    said = ended(["fit", "--config", str(mine), *words], capsys)
    assert expected in said
    assert len(said) < 400


def test_no_recipe_at_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected `--recipe NAME` or `--config FILE`" in ended(["fit"], capsys)


def test_help_is_short_and_has_every_argument_of_the_callback(capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--help"])
    said = capsys.readouterr().out
    from inspect import signature

    from lightning_dp import DifferentialPrivacy

    assert set(signature(DifferentialPrivacy).parameters) == set(arguments())
    assert all(f"\n  {name} " in said for name in arguments())
    main(["validate", "--help"])
    assert len(capsys.readouterr().out.splitlines()) < 20


def test_the_errors_of_the_package_are_in_one_place() -> None:
    from lightning_dp import errors

    for name in errors.__all__:
        assert issubclass(getattr(errors, name), Exception)
    with pytest.raises(AttributeError, match="NoSuchError"):
        errors.NoSuchError  # noqa: B018  # reading it is the test


def test_arguments_of_other_libraries_are_answered_with_their_name_here() -> None:
    from inspect import signature

    from lightning_dp import DifferentialPrivacy
    from lightning_dp.callbacks.other_names import OTHERS

    with pytest.raises(TypeError, match=r"target_epsilon=: expected epsilon=\. max_grad_norm=: expected clip_norm="):
        DifferentialPrivacy(target_epsilon=8.0, max_grad_norm=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilonn'"):
        DifferentialPrivacy(epsilonn=8.0)
    own = set(signature(DifferentialPrivacy).parameters)
    assert "epsilon" in own
    assert not own & set(OTHERS)
