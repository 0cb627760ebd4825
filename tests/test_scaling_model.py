"""docs/scaling.md says what its model says, and the model behaves as a step does."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("scaling_model", ROOT / "benchmarks" / "scaling_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_model"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_page_is_that_of_the_model(model: ModuleType) -> None:
    assert model.table() in (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")


def test_efficiency_passes_its_mark_at_the_batch_that_is_named_and_not_before(model: ModuleType) -> None:
    machine = model.Machine()
    for network in model.NETWORKS:
        for gpus in model.GPUS:
            batch = model.efficient_batch(network, machine, gpus)
            assert model.efficiency(network, machine, gpus, batch) >= model.EFFICIENT
            assert model.efficiency(network, machine, gpus, batch - 1) < model.EFFICIENT


def test_what_goes_over_the_network_does_not_depend_on_the_batch_and_half_the_bandwidth_doubles_it(
    model: ModuleType,
) -> None:
    network, gpus = model.NETWORKS[1], 64
    fast = model.reduction(network, model.Machine(latency=0.0), gpus)
    slow = model.reduction(network, model.Machine(latency=0.0, inside=225e9, between=25e9), gpus)
    assert slow == pytest.approx(2 * fast)
    assert model.gradients(network, model.Machine(), gpus, 128) == pytest.approx(
        2 * model.gradients(network, model.Machine(), gpus, 64)
    )
