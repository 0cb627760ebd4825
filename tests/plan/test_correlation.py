"""A strategy matrix as plain values: found, written, read again, and refused."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_dp.plan.correlation import Correlation

FOUND = [
    Correlation.found("banded", steps=50, momentum=0.9, groups=4, bands=4),
    Correlation.found("banded", steps=50, momentum=0.0, groups=1, bands=1),
    Correlation.found("lambda", steps=50, momentum=0.9, groups=10),
    Correlation.found("bisr", steps=50, momentum=0.5, groups=10, bands=3),
]


@pytest.mark.parametrize("found", FOUND, ids=lambda one: f"{one.style}-{one.bands}")
def test_it_is_written_and_read_without_loss(found: Correlation) -> None:
    assert Correlation.read(str(found)) == found


@pytest.mark.parametrize("found", FOUND, ids=lambda one: f"{one.style}-{one.bands}")
def test_its_numbers_are_those_of_the_matrix(found: Correlation) -> None:
    column = np.zeros(70)
    column[: found.bands] = found.matrix
    c = np.array([[column[i - j] if i >= j else 0.0 for j in range(70)] for i in range(70)])
    strategy = np.linalg.inv(c) if found.of_inverse else c
    assert found.column_norm == pytest.approx(np.linalg.norm(strategy[:50, 0]))
    for steps in (1, 7, 50, 70):  # more than it was made for, too
        assert found.sensitivity(steps, 10) == pytest.approx(np.linalg.norm(strategy[:steps, :steps:10].sum(1)))


def test_independent_noise_has_no_matrix() -> None:
    assert Correlation.read("independent") is None
    with pytest.raises(ValueError, match="noise='independent' with a strategy matrix"):
        Correlation("independent", 10, 0.9, (1.0,))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("banded", "expected 'independent', or the text of a strategy matrix"),
        (3, "expected 'independent'"),
        ("banded for 9 steps, momentum 0.9: 1.0 x", "could not convert"),
        ("banded for 9 steps, momentum 1.5: 1.0", r"noise_momentum=1.5: expected a number in \[0, 1\)"),
        ("banded for 9 steps, momentum 0.9: nan 1.0", "noise_matrix"),
        ("banded for 9 steps, momentum 0.9: 0.0 1.0", "the first above 0"),
        ("banded for 0 steps, momentum 0.9: 1.0", "noise_steps=0"),
    ],
)
def test_other_texts_are_refused(text: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Correlation.read(text)


def test_more_bands_than_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="noise_bands=8 with 7 steps: expected at most as many bands as steps"):
        Correlation.found("banded", steps=7, momentum=0.9, groups=8, bands=8)
    with pytest.raises(ValueError, match=r"noise_bands=0"):
        Correlation.found("bisr", steps=7, momentum=0.9, groups=8, bands=0)
    with pytest.raises(ValueError, match=r"noise='pink': expected one of 'independent', 'banded', 'lambda', 'bisr'"):
        Correlation("pink", 7, 0.9, (1.0,))
