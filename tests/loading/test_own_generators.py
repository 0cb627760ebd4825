"""Where generators are looked for: in what user code holds and names, and not in the thousands of objects of a framework."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from lightning_dp.loading.own_generators import own_generators, reachable

OWN = random.Random(3)


class Reads:
    """A data set that raises, as pytest does, and draws."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def __getitem__(self, index: int) -> float:
        if index < 0:
            pytest.fail("no such example")
        return OWN.random()


@pytest.mark.parametrize("generator", [torch.Generator(), np.random.default_rng(0), random.Random(0)])
def test_generators_that_are_held_and_those_that_code_names_are_found(generator: Any) -> None:
    assert {id(one) for one in own_generators(Reads(generator))} == {id(generator), id(OWN)}


def test_a_framework_that_code_names_is_not_looked_through(request: pytest.FixtureRequest) -> None:
    """It would be in every micro-batch, and what is far from the owners would not be reached behind it."""
    found = reachable(Reads(request.config))
    assert request.config in found
    assert len(found) < 50
