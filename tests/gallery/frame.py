"""Every script of the gallery, with the line that makes it private and without it, and the table that says what happens.

A script is an ordinary program that runs anywhere: ``python lstm.py``. What belongs to privacy in it are the lines that name
``DifferentialPrivacy`` (the argument of the Trainer, and the import that goes with it); the public version is the same
text without them.
"""

from __future__ import annotations

import difflib
import logging
import re
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "gallery.md"
MACHINERY = ("__init__", "frame")

ROW = re.compile(r"^\| \[`(\w+)`\]\(\S+\) \| (.+?) \| (.+?) \| (.+?) \|$", re.MULTILINE)


@dataclass(frozen=True)
class Row:
    """What the page says of a script: its subject, the engine chosen or ``–``, and how it ends."""

    subject: str
    engine: str
    result: str

    @property
    def message(self) -> str | None:
        """What the refusal says, if it is refused."""
        found = re.search(r"^refused: `(.+)`", self.result)
        return found.group(1) if found else None


def scripts() -> list[str]:
    """The names of all scripts."""
    names = sorted(path.stem for path in FOLDER.glob("*.py"))
    return [name for name in names if name not in MACHINERY and not name.startswith("test_")]


def table() -> dict[str, Row]:
    """The table of the page, by script."""
    found: list[tuple[str, ...]] = ROW.findall(PAGE.read_text(encoding="utf-8"))
    rows = {name: Row(subject, engine, result) for name, subject, engine, result in found}
    assert len(rows) == len(found), "a script has two rows"
    return rows


def private_text(name: str) -> str:
    """The script as it stands."""
    return (FOLDER / f"{name}.py").read_text(encoding="utf-8")


def public_text(name: str) -> str:
    """The script before somebody made it private."""
    return "".join(line for line in private_text(name).splitlines(keepends=True) if "DifferentialPrivacy" not in line)


def added_lines(name: str) -> list[str]:
    """What the private version has that the public one has not, the imports left out."""
    diff = difflib.ndiff(public_text(name).splitlines(), private_text(name).splitlines())
    changed = [line for line in diff if line[0] in "+-"]
    assert all(line[0] == "+" for line in changed), "the private version changes a line"
    added = [line[2:].strip() for line in changed]
    return [line for line in added if not line.startswith(("from lightning_dp import", "import lightning_dp"))]


class _Screen(logging.Handler):
    """What Lightning shows."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines += record.getMessage().splitlines()


def run(text: str, name: str) -> list[str]:
    """Run a script, and return the lines on the screen."""
    screen, lightning = _Screen(), [logging.getLogger(root) for root in ("lightning.pytorch", "pytorch_lightning")]
    for root in lightning:  # the one imported last tells for both
        root.addHandler(screen)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            exec(compile(text, str(FOLDER / f"{name}.py"), "exec"), {"__name__": "__main__"})
    finally:
        for root in lightning:
            root.removeHandler(screen)
    return screen.lines


def engine_of(screen: list[str]) -> str:
    """The engine that the run said it would use."""
    (line,) = (line for line in screen if line.startswith("  engine "))
    return line.split()[1].rstrip(":")
