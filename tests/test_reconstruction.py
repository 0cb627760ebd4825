"""The page on reconstruction tells the truth: digits come out without privacy, and do not at ε = 8."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
reconstruction: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "reconstruction.py")))
ATTACKS = ("analytic", "matching")


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    return reconstruction.attack()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_update_without_privacy_holds_the_digit(
    found: tuple[dict[str, torch.Tensor], dict[str, float]], name: str
) -> None:
    pictures, correlations = found
    assert correlations[f"{name}, no privacy"] > 0.95
    assert correlations[f"{name}, no privacy"] > correlations["guess"] + 0.05
    error = (pictures[f"{name}, no privacy"] - pictures["truth"]).abs().mean()
    assert float(error) < (1e-4 if name == "analytic" else 0.1)


@pytest.mark.parametrize("name", ATTACKS)
def test_at_epsilon_8_it_holds_less_than_a_guess(
    found: tuple[dict[str, torch.Tensor], dict[str, float]], name: str
) -> None:
    _, correlations = found
    assert abs(correlations[f"{name}, ε = 8 in 100 steps"]) < 0.3
    assert correlations[f"{name}, ε = 8 in one step"] < 0.5 < correlations["guess"]


@pytest.mark.parametrize("name", ATTACKS)
def test_the_noise_is_what_protects(found: tuple[dict[str, torch.Tensor], dict[str, float]], name: str) -> None:
    """The same step with an ε that means nothing: clipping alone hides nothing."""
    assert found[1][f"{name}, ε = 100,000 in one step"] > 0.9


def test_the_page_has_the_picture_and_the_numbers(found: tuple[dict[str, torch.Tensor], dict[str, float]]) -> None:
    pictures, correlations = found
    page = (ROOT / "docs" / "reconstruction.md").read_text(encoding="utf-8")
    for kind in reconstruction.KINDS:
        row = next(line for line in page.splitlines() if line.startswith(f"| {kind} |"))
        told = [float(cell) for cell in row.split("|")[2:4]]
        assert told == pytest.approx([correlations[f"{name}, {kind}"] for name in ATTACKS], abs=0.1)
    assert (ROOT / "docs" / "reconstruction.png").stat().st_size < 50_000
    height, width = reconstruction.draw(pictures).shape
    assert (height, width) == (10 * 9 * 4 + 9 * 4, 10 * 9 * 4)
