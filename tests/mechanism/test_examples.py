from __future__ import annotations

import doctest
import importlib

import pytest

STAGES = [
    "batches.microbatch",
    "mechanism.average",
    "mechanism.clip",
    "mechanism.discrete_gaussian",
    "mechanism.gaussian",
    "mechanism.grid",
    "mechanism.keystream",
    "mechanism.noise",
    "mechanism.randomness",
    "mechanism.sampling",
    "mechanism.shards",
]


@pytest.mark.parametrize("stage", STAGES)
def test_the_examples_of_the_documentation_hold(stage: str) -> None:
    results = doctest.testmod(importlib.import_module(f"lightning_dp.{stage}"))
    assert results.attempted > 0
    assert results.failed == 0
