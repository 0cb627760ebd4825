"""The README's picture has every measured result, and every published one that it names."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
figure: Any = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "accuracy_by_epsilon.py")))
ROW = "another kind,2,70.5,0.5,3,lightning-dp fit --recipe digits/cnn_eps2\n"


def marks(picture: Path) -> set[str]:
    """What is drawn of measured results."""
    return set(re.findall(r'id="(measured-[^"]*)"', picture.read_text(encoding="utf-8")))


def test_the_picture_in_the_readme_is_that_of_the_table() -> None:
    assert marks(figure.PICTURE) == {one.mark for one in figure.results()}, (
        "uv run python benchmarks/accuracy_by_epsilon.py draws it again"
    )
    assert "docs/accuracy_by_epsilon.svg" in (ROOT / "README.md").read_text(encoding="utf-8").split("## ")[0]


@pytest.mark.parametrize("row", [ROW, ROW.replace(",2,", ",inf,"), ROW.replace("0.5,3", ",1")])
def test_a_new_row_is_all_that_a_new_result_takes(row: str, tmp_path: Path) -> None:
    table, drawn = tmp_path / "table.csv", tmp_path / "drawn.svg"
    table.write_text(figure.TABLE.read_text(encoding="utf-8") + row, encoding="utf-8")
    found = figure.results(table)
    figure.picture(found, drawn)
    assert marks(drawn) - marks(figure.PICTURE) == {found[-1].mark}
    assert marks(figure.PICTURE) < marks(drawn)


def test_it_is_read_on_any_background() -> None:
    """It brings its own: the first thing that is drawn is white and as large as the picture."""
    text = figure.PICTURE.read_text(encoding="utf-8")
    background = text[text.index('id="patch_1"') :].split("</g>")[0]
    assert "fill: #ffffff" in background


def test_each_result_names_a_recipe_and_a_number_that_can_be() -> None:
    for one in figure.results():
        (recipe,) = re.findall(r"^lightning-dp fit --recipe (\S+)", one.command)
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file()
        assert one.epsilon > 0
        assert 0 < one.accuracy < 100
        assert one.seeds >= 1
        assert math.isnan(one.deviation) == (one.seeds == 1), "a deviation is of several runs"
