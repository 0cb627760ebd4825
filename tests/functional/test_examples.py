from __future__ import annotations

import doctest
import importlib

import pytest

STAGES = [
    "average",
    "clip",
    "discrete_gaussian",
    "grid",
    "keystream",
    "microbatch",
    "noise",
    "randomness",
    "sample",
    "shards",
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_examples_of_the_documentation_hold(stage: str) -> None:
    results = doctest.testmod(importlib.import_module(f"lightning_dp.functional.{stage}"))
    assert results.attempted > 0
    assert results.failed == 0
