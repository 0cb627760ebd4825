"""The command ``lightning-dp``: which command it is; what a command needs is imported for it alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_dp.version import __version__

OVERVIEW = """\
usage: lightning-dp COMMAND [options]

Differentially private training with PyTorch Lightning.

  recipes   fit, validate, test, predict   lightning-dp fit --recipe digits/cnn_eps8
            recipes                        which there are; show one, or copy one to change it
  numbers   epsilon                        the ε that a noise multiplier gives
            calibrate                      the noise multiplier that an ε needs
            search                         the ε of choosing settings by several runs
  pictures  report                         finished runs: accuracy against ε, budget, validation
  evidence  statement                      whether what a run says it has spent follows from what it charged
            verify                         a recipe replayed without one example: the check before a real run
            audit                          a lower bound on ε, from training a recipe once with canaries
  shell     completion                     what bash, zsh or fish needs so that Tab completes commands and recipes

lightning-dp COMMAND --help says more. --version prints the version.
"""

COMMANDS = {
    "audit": "audit:run",
    "calibrate": "numbers:calibrate",
    "completion": "completion:run",
    "epsilon": "numbers:epsilon",
    "recipes": "recipe_list:run",
    "report": "report:run",
    "search": "search:run",
    "statement": "statement:run",
    "verify": "verify:run",
}
LIGHTNINGS = ("fit", "validate", "test", "predict")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``lightning-dp`` and ``python -m lightning_dp``.

    Args:
        arguments: command line without the program's name; ``None`` for the process's own.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    command = words[0] if words else "--help"
    if command in ("-h", "--help"):
        print(OVERVIEW, end="")
    elif command == "--version":
        print(f"lightning-dp {__version__}")
    elif command in COMMANDS:
        module, name = COMMANDS[command].split(":")
        try:
            getattr(import_module(f"lightning_dp.cli.{module}"), name)(words[1:])
            sys.stdout.flush()
        except BrokenPipeError:  # whoever reads has seen enough, as `head` has
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left goes there when Python ends
            raise SystemExit(1) from None
    else:
        _lightning(words)


def _lightning(words: list[str]) -> None:
    """One of LightningCLI's commands, or a word that is none."""
    from lightning_dp.cli.recipe_files import alike, expanded, fail

    if words[0] not in LIGHTNINGS and not words[0].startswith("-"):
        known = sorted((*COMMANDS, *LIGHTNINGS))
        fail(f"command {words[0]!r}: expected one of {', '.join(known)}.{alike(words[0], known)}")
    if {"-h", "--help"} & set(words[1:]):
        from lightning_dp.cli.fit_help import text

        print(text(words[0]), end="")
        return
    words = ["--help" if word == "--help.all" else word for word in words]
    from lightning_dp.cli import seeds

    words, count, file = seeds.take_out(words)
    expanded(words)  # a missing file is said before PyTorch is imported
    if count is not None:
        seeds.run(words, count, file)
        return

    from lightning_dp.cli.recipes import run

    run(words)
