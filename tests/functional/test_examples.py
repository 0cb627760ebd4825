from __future__ import annotations

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "stage", ["average", "clip", "discrete_gaussian", "grid", "keystream", "microbatch", "randomness", "sample"]
)
def test_the_examples_of_the_documentation_hold(stage: str) -> None:
    results = doctest.testmod(importlib.import_module(f"lightning_dp.functional.{stage}"))
    assert results.attempted > 0
    assert results.failed == 0
