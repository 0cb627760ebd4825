"""The parser of LightningCLI's commands with errors that are a sentence: what is wrong, and what may have been meant."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lightning_dp.cli.recipe_files import alike, fail

_NOISE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:",
    "Given value type: ",
    "Given value: ",
    "Subclass types expect one of:",
)
"""Lines of jsonargparse's messages that do not say what is wrong."""


class RecipeParser(LightningArgumentParser):
    """Says what is wrong in one sentence, and which option, argument or class of that name there is."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the command with code 2; with ``JSONARGPARSE_DEBUG`` in the environment as jsonargparse does, by a traceback."""
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        if "the following arguments are required: " in message and message.endswith(".model"):
            fail(
                "no module to train: expected `--recipe NAME` or `--config FILE`. `lightning-dp recipes` lists the recipes."
            )
        sentence = " ".join(said(message).split())
        fail(f"{sentence.rstrip('.')}.{self._hint(message)}")

    def _hint(self, message: str) -> str:
        unknown = re.search(r"(?:unrecognized arguments: |does not accept option )'?(?:--)?([\w.]+)", message)
        if unknown:
            return alike(f"{unknown[1]}", sorted(self._options()))
        argument = re.search(r"class_path '([\w.]+)':\s+Option '(\w+)' is not accepted", message)
        if argument:
            return alike(argument[2], _arguments(argument[1]))
        name = re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message)
        return alike(name[2], _public(name[1])) if name else ""

    def _options(self) -> Iterator[str]:
        """Names of all options, without the dashes, of this parser and of its commands."""
        for action in self._actions:
            yield from (option.removeprefix("--") for option in action.option_strings if option.startswith("--"))
            for parser in (getattr(action, "_name_parser_map", None) or {}).values():
                if isinstance(parser, RecipeParser):
                    yield from parser._options()


def said(message: str) -> str:
    """The lines of a message of jsonargparse that say what is wrong.

    Of the types that a value may have, those that it was not meant to be are left out, as is the value itself.
    """
    kept: list[str] = []
    skipped: int | None = None  # deeper lines than this belong to an item that is left out
    for line in message.splitlines():
        text = line.strip()
        depth = len(line) - len(line.lstrip())
        if skipped is not None and depth > skipped:
            continue
        skipped = None
        item = text.removeprefix("- ")
        if item.startswith("Expected a <class 'NoneType'>") or item.startswith("Not a valid subclass of "):
            skipped = depth
        elif item and not item.startswith(_NOISE):
            kept.append(re.sub(r"(?:\ba )?<class '([\w.]+)'>", r"\1", item))
    return "\n".join(kept) or message


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    return list(inspect.signature(getattr(import_module(module), name)).parameters)


def _public(module: str) -> list[str]:
    found: Any = import_module(module)
    return [name for name in dir(found) if not name.startswith("_")]
