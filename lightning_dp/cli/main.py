"""The command ``lightning-dp``: which command it is; what a command needs is imported for it alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_dp.version import __version__

OVERVIEW = """\
usage: lightning-dp COMMAND [options]

Differentially private training with PyTorch Lightning.

  recipes   fit, validate, test, predict   lightning-dp fit --config recipes/digits/cnn_eps8.yaml
  numbers   epsilon                        the ε that a noise multiplier gives
            calibrate                      the noise multiplier that an ε needs
            search                         the ε of choosing settings by several runs
  pictures  report                         finished runs: accuracy against ε, budget, validation
  evidence  statement                      whether what a run says it has spent follows from what it charged
            verify                         a recipe replayed without one example: the check before a real run
            audit                          a lower bound on ε, from training a recipe once with canaries

lightning-dp COMMAND --help says more. --version prints the version.
"""


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
    elif command == "epsilon":
        from lightning_dp.cli.numbers import epsilon

        epsilon(words[1:])
    elif command == "calibrate":
        from lightning_dp.cli.numbers import calibrate

        calibrate(words[1:])
    elif command == "search":
        from lightning_dp.cli.search import run as run_search

        run_search(words[1:])
    elif command == "report":
        from lightning_dp.cli.report import run as run_report

        run_report(words[1:])
    elif command == "statement":
        from lightning_dp.cli.statement import run as run_statement

        run_statement(words[1:])
    elif command == "verify":
        from lightning_dp.cli.verify import run as run_verify

        run_verify(words[1:])
    elif command == "audit":
        from lightning_dp.cli.audit import run as run_audit

        run_audit(words[1:])
    else:
        from lightning_dp.cli.recipes import run

        run(words)
