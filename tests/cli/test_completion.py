"""Shell completion: what is offered is what there is, without heavy imports, in each shell that is at hand."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

from lightning_dp.cli.completion import SHELLS, candidates, options
from lightning_dp.cli.main import COMMANDS, LIGHTNINGS, main
from lightning_dp.cli.recipe_files import names


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("completion", "recipes")])
def test_the_options_offered_are_those_of_the_parser(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: set[str] = set()

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.update(option for action in parser._actions for option in action.option_strings)
        raise InterruptedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", stop)  # which parse_args calls
    module, function = COMMANDS[command].split(":")
    with pytest.raises(InterruptedError):
        getattr(import_module(f"lightning_dp.cli.{module}"), function)([])
    assert {*options(command), "-h", "--help"} == found


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["cal"], ["calibrate"]),
        (["fit", "--rec"], ["--recipe"]),
        (["fit", "--recipe", "digits/cnn_e"], ["digits/cnn_eps2", "digits/cnn_eps8"]),
        (["fit", "--recipe", "=", "digits/cnn_n"], ["digits/cnn_nonprivate"]),  # as bash splits it
        (["fit", "--recipe=digits/cnn_n"], ["--recipe=digits/cnn_nonprivate"]),  # as zsh and fish do
        (["fit", "--recipe", "digits/cnn_eps8", "--trainer.max_st"], ["--trainer.max_steps"]),
        (["recipes", ""], ["copy", "list", "show"]),
        (["recipes", "show", "digits/cnn_n"], ["digits/cnn_nonprivate"]),
        (["report", "--beside", "cifar100"], ["cifar100-finetuning"]),
        (["report", "runs/a"], []),  # a folder: the shell's own
        (["fit", "--config", "my"], []),
        (["nonsense", "--"], ["--help"]),
        (["completion", "z"], ["zsh"]),
    ],
)
def test_what_is_offered(words: list[str], found: list[str]) -> None:
    assert candidates(words) == found


def test_every_command_and_recipe_is_offered() -> None:
    assert {*COMMANDS, *LIGHTNINGS} <= set(candidates([""]))
    assert candidates(["fit", "--recipe", ""]) == names()


def test_it_needs_neither_numpy_nor_torch() -> None:
    code = (
        "import sys; from lightning_dp.cli.main import main; main(['completion', 'words', '--', 'fit', '--recipe', 'd']); "
        "assert not {'numpy', 'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_shell_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["completion", "bsh"])
    assert ended.value.code == 2
    assert "completion 'bsh': expected one of bash, fish, zsh. Did you mean bash" in capsys.readouterr().err


ASK = {
    "bash": 'COMP_WORDS=(lightning-dp {0}); COMP_CWORD={1}; _lightning_dp; printf "%s\\n" "${{COMPREPLY[@]}}"',
    # compadd works in a widget alone, so that the test takes its place
    "zsh": 'compadd() {{ shift; print -l -- "$@" }}; words=(lightning-dp {0}); CURRENT=$(({1} + 1)); _lightning_dp',
    "fish": "complete -C 'lightning-dp {2}'",
}
OPTIONS = {"bash": ["--norc", "-c"], "zsh": ["-f", "-c"], "fish": ["--no-config", "-c"]}
BEFORE = {"bash": "", "zsh": "compdef() { : }; ", "fish": ""}


def asked(shell: str, words: Sequence[str], folder: Path) -> list[str]:
    """What a shell would offer after Tab, the program being this interpreter's."""
    program = folder / "lightning-dp"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lightning_dp "$@"\n')
    program.chmod(0o755)
    quoted = " ".join(f"'{word}'" for word in words)
    question = ASK[shell].format(quoted, len(words), " ".join(words))
    script = f"{BEFORE[shell]}{SHELLS[shell]}\n{question}"
    path = f"{folder}:/usr/local/bin:/usr/bin:/bin"
    root = str(Path(__file__).parents[2])
    command = [str(shutil.which(shell)), *OPTIONS[shell], script]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PATH": path, "PYTHONPATH": root, "HOME": str(folder)}
    )
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here; what the script asks for is tested above")
    assert asked(shell, ["fit", "--recipe", "digits/cnn_e"], tmp_path) == ["digits/cnn_eps2", "digits/cnn_eps8"]
    assert asked(shell, ["veri"], tmp_path) == ["verify"]
