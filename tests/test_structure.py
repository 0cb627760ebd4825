"""The house stays easy to change: what ``benchmarks/structure.py`` counts keeps within the bounds that were reached."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("structure", ROOT / "benchmarks" / "structure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rooms_floors_and_arrows(structure: ModuleType) -> None:
    imports = structure.arrows()
    assert len(imports) <= 28
    assert structure.floors(imports) <= 13
    assert sum(map(len, imports.values())) <= 125
    assert len(list(structure.PACKAGE.glob("*.py"))) <= 9
    assert (
        len(list(structure.PACKAGE.glob("*/__init__.py"))) <= 18
    )  # with optim: what users name in YAML, as torch.optim


def test_a_step_has_no_state_that_is_put_in_later(structure: ModuleType) -> None:
    everything, later = structure.attributes("PrivateStep")
    assert 0 < len(everything) <= 6
    assert not later
    callback, _ = structure.attributes("DifferentialPrivacy")
    assert len(callback - structure.arguments("DifferentialPrivacy")) <= 8


def test_few_are_handed_a_strategy(structure: ModuleType) -> None:
    takers = structure.takers("strategy")
    assert len(takers) <= 15
    assert len({one.split(":")[0] for one in takers}) <= 4


def test_nobody_looks_upstairs_for_the_fit_under_way() -> None:
    """Only the strategy's twins, and the callback that gives it to them, know the fit; nobody asks a strategy for it."""
    package = ROOT / "lightning_dp"
    knowing = {str(path.relative_to(package)) for path in package.rglob("*.py") if "private_fit" in path.read_text()}
    assert knowing == {"strategy.py", "callbacks/differential_privacy.py"}


def test_what_is_ignored_or_skipped_says_why() -> None:
    """Types are checked in the package alone, so that nothing has to be ignored in tests; ruff finds what is not needed."""
    silent, reason = (
        [],
        re.compile(r"(type: ignore\[[^]]+\]|noqa: [A-Z0-9, ]+|pragma: no cover)  ?[#(]|reason=|skip\(f?\""),
    )
    ignored = re.compile(r"# type: ignore|# noqa|# pragma|mark\.skip|mark\.xfail|pytest\.(skip|xfail|importorskip)\(")
    for folder in ("lightning_dp", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*.py"):
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                types = "# type: " + "ignore" in line and folder != "lightning_dp"
                if path != Path(__file__) and ignored.search(line) and (types or not reason.search(line)):
                    silent.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not silent


def test_every_file_can_be_read_in_one_sitting(structure: ModuleType) -> None:
    lengths = {str(path): len((structure.PACKAGE / path).read_text().splitlines()) for path, _ in structure.files()}
    assert {path: lines for path, lines in lengths.items() if lines > 400} == {}
