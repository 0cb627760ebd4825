"""What ``lightning-dp fit --help`` says: the options that people use, and the arguments of ``DifferentialPrivacy``.

LightningCLI's own help has every argument of the Trainer and none of the callbacks; ``--help.all`` shows it.
"""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

_OPTIONS = """\
usage: lightning-dp {command} --recipe NAME | --config FILE [options]

  --recipe NAME            a recipe that comes with the package; `lightning-dp recipes` lists them
  --config FILE            a recipe of your own; several are laid on one another, later ones winning
  --data DIR               where the recipe's data are
  --ckpt_path FILE         {checkpoint}
  --simulate S             the recipe at 1/S of its batch and noise, for choosing settings: NOT PRIVATE
{seeds}  --print_config           show all settings, and do nothing
  --trainer.ARGUMENT       an argument of the Trainer: --trainer.max_steps 100, --trainer.devices 4
  --data.init_args.NAME    an argument of the data module
  --model.init_args.NAME   an argument of the module

`lightning-dp {command} --help.all` shows every option of LightningCLI.
"""

_CALLBACK = """
In a recipe, privacy is a callback:

  trainer:
    callbacks:
      - class_path: lightning_dp.DifferentialPrivacy
        init_args:
          epsilon: 8.0

Its arguments:
"""

_SEEDS = """\
  --seeds K                K runs with the seeds 0 to K-1, each a process of its own, and mean ± standard deviation. Each is a
                           private run on the same data: publishing several costs their composition, which is printed
  --seeds_file FILE        where their results are kept, so that what was interrupted goes on; default seeds.jsonl
"""


def text(command: str) -> str:
    """The help of one of LightningCLI's commands.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    goes_on = "go on with this checkpoint, budget included" if command == "fit" else "whose weights are taken"
    shown = _OPTIONS.format(command=command, checkpoint=goes_on, seeds=_SEEDS if command == "fit" else "")
    return shown + _CALLBACK + "\n".join(_lines()) + "\n" if command == "fit" else shown


def option_names(command: str) -> list[str]:
    """The options that the help of one of LightningCLI's commands names; after one that ends in a dot comes an argument's name.

    Args:
        command: ``fit``, ``validate``, ``test`` or ``predict``.
    """
    named = re.findall(
        r"^  (--[\w.]+?)(?:ARGUMENT|NAME)?(?= )",
        _OPTIONS.format(command=command, checkpoint="", seeds=_SEEDS if command == "fit" else ""),
        re.MULTILINE,
    )
    return [*dict.fromkeys(named), "--help", "--help.all"]


def arguments() -> dict[str, str]:
    """The arguments of ``DifferentialPrivacy``, and what its docstring says of each, read without importing PyTorch."""
    source = Path(__file__).parents[1] / "callbacks" / "differential_privacy.py"
    (found,) = (
        node
        for node in ast.parse(source.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "DifferentialPrivacy"
    )
    section = (ast.get_docstring(found) or "").split("\nArgs:\n")[1].split("\nRaises:\n")[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n(?: {8}.*)?)*)", section, flags=re.MULTILINE)
    return {name: " ".join(said.replace("``", "").split()) for name, said in entries}


def _lines() -> list[str]:
    return [
        textwrap.fill(f"{_short(said)}", 110, initial_indent=f"  {name:<23}  ", subsequent_indent=" " * 27)
        for name, said in arguments().items()
    ]


def _short(said: str) -> str:
    """Without references to classes and modules of the documentation."""
    said = re.sub(r" \((?:see )?:\w+:`[^`]+`\)", "", said)
    return re.sub(r":\w+:`[~]?([^`]+)`", r"\1", said)
