"""The table of theorems names code that exists."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parents[2] / "docs" / "guarantees.md"
NAMED = re.findall(r"\| `(lightning_dp\.[\w.]+)` \|$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", NAMED)
def test_the_code_of_each_step_exists(name: str) -> None:
    parts = name.split(".")
    split = next(index for index, part in enumerate(parts) if part[0].isupper() or index == len(parts) - 1)
    found = import_module(".".join(parts[:split]))
    for part in parts[split:]:
        found = getattr(found, part)
    assert callable(found)


def test_every_step_of_the_mechanism_is_in_the_table() -> None:
    assert len(NAMED) == 18


def test_the_tests_that_hold_isolation_exist() -> None:
    """Each row that is held by construction or refused names one."""
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = text[text.index("| what could reach") : text.index("| **what remains**")].splitlines()[2:]
    held = [row for row in rows if not row.startswith("| **")]
    for row in held:
        names = re.findall(r"`((?:tests/)?[\w/]+(?:\.py|/))`", row.split("|")[3])
        assert names, row
        for name in names:
            root = DOCUMENT.parents[1]
            assert (root / name if "/" in name else root / "tests" / "guarantees" / name).exists(), name
    assert len(held) >= 14
