"""The gallery's page is true: each script runs without privacy, and with one more line as its row says."""

from __future__ import annotations

import ast
import re

import pytest

from tests.gallery.frame import added_lines, engine_of, private_text, public_text, run, scripts, table

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # peft's own
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),  # an error would cost the engine
    pytest.mark.filterwarnings("ignore:The loss of a batch is neither the mean:UserWarning"),  # of language models
]


def test_every_script_has_a_row_and_every_row_a_script() -> None:
    assert set(scripts()) == set(table())


@pytest.mark.parametrize("name", scripts())
def test_privacy_is_one_line(name: str) -> None:
    (line,) = added_lines(name)
    assert "DifferentialPrivacy(" in line
    left = [line for line in public_text(name).splitlines() if "make_trainable_privately" not in line]
    assert not any("lightning_dp" in line for line in left)
    ast.parse(public_text(name))


@pytest.mark.parametrize("name", scripts())
def test_the_row_names_the_scripts_subject(name: str) -> None:
    docstring = ast.get_docstring(ast.parse(private_text(name)))
    assert docstring is not None
    assert docstring.splitlines()[0] == f"{table()[name].subject}."


@pytest.mark.parametrize("name", scripts())
def test_without_the_line_it_is_a_program_that_trains(name: str) -> None:
    assert not any(line.startswith("lightning_dp") for line in run(public_text(name), name))


@pytest.mark.parametrize("name", scripts())
def test_with_the_line_it_ends_as_the_page_says(name: str) -> None:
    row = table()[name]
    if row.message is not None:
        assert row.engine == "–"
        with pytest.raises(Exception) as caught:  # noqa: PT011 (the row says which text)
            run(private_text(name), name)
        assert row.message in str(caught.value)
        return
    engine = engine_of(run(private_text(name), name))
    assert f"`{engine}`" == row.engine
    assert row.result.startswith("slower" if engine == "loop" else "works")


@pytest.mark.parametrize("name", scripts())
def test_it_needs_nothing_of_this_repository_but_the_package(name: str) -> None:
    assert not re.search(r"^\s*(from|import) tests\b", private_text(name), re.MULTILINE)
