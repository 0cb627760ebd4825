"""A run as one of its processes sees it. What several processes do is in test_ranks.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_dp.errors import PreflightError
from lightning_dp.ranks.gathering import gathered, on_every_rank, on_rank_zero
from lightning_dp.ranks.world import World, world_of
from tests.conftest import trainer

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def test_a_trainer_on_one_device_is_a_world_of_one() -> None:
    assert world_of(trainer().strategy) == ALONE


def test_how_parameters_are_kept_is_asked_of_the_strategy_once() -> None:
    strategy: Any = type("Sharded", (), {"root_device": torch.device("cpu"), "gather": "layer", "global_rank": 2})()
    strategy.world_size, strategy.num_processes = 4, 2
    assert world_of(strategy) == World(2, 4, torch.device("cpu"), neighbours=2, gather="layer")


def test_alone_everything_is_as_it_was_given() -> None:
    value = torch.tensor([1.0, 2.0])
    assert ALONE.broadcast("key") == "key"
    assert torch.equal(ALONE.sum(value), value)
    assert torch.equal(ALONE.mean(value), value)
    assert gathered(ALONE, 3) == [3]
    assert on_rank_zero(ALONE, lambda: 5) == 5


def test_the_strategy_reduces_by_the_name_that_is_asked_for() -> None:
    class Strategy:
        root_device = torch.device("cpu")

        def reduce(self, tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
            return tensor * {"sum": 4, "mean": 1}[reduce_op]

    world = world_of(Strategy())
    assert float(world.sum(torch.tensor(1.0))) == 4.0
    assert float(world.mean(torch.tensor(1.0))) == 1.0


@pytest.mark.parametrize("together", [on_rank_zero, lambda world, work: on_every_rank(world, work, PreflightError)])
def test_an_error_is_raised_where_it_happened(together: Any) -> None:
    def refuse() -> None:
        raise ValueError("expected another")

    with pytest.raises(ValueError, match="expected another"):
        together(ALONE, refuse)
