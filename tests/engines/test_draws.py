"""torch.distributions draws for each example anew, by its own law, and is left as it was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, Normal, normal
from torch.func import functional_call
from torchvision.ops import stochastic_depth

from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.vmap import VmapEngine

EXAMPLES = 2000


def draws(distribution: Any, engine: Any) -> Tensor:
    """One draw for each example, as the gradient's norm tells it."""
    module = nn.Linear(1, 1)

    def loss_function(parameters: Mapping[str, Tensor], batch: Tensor) -> tuple[Tensor, Any]:
        drawn = distribution(batch)
        return functional_call(module, dict(parameters), (drawn,)).sum(), {"drawn": drawn}

    torch.manual_seed(0)
    found = engine(module).clipped_sum(
        loss_function, dict(module.named_parameters()), torch.zeros(EXAMPLES, 1), EXAMPLES, 1.0
    )
    return found.outputs["drawn"].flatten()


@pytest.mark.parametrize("engine", [GhostEngine, lambda _: VmapEngine()], ids=["ghost", "vmap"])
@pytest.mark.parametrize(
    "distribution",
    [lambda x: Normal(x, 1.0).rsample(), lambda x: MultivariateNormal(x, torch.eye(1)).rsample()],
    ids=["normal", "multivariate"],
)
def test_each_example_draws_by_the_law(distribution: Any, engine: Any) -> None:
    original = normal._standard_normal
    drawn = draws(distribution, engine)
    assert len(set(drawn.tolist())) == EXAMPLES
    assert stats.kstest(drawn.numpy(), "norm").pvalue > 1e-6
    assert normal._standard_normal is original


@pytest.mark.parametrize("engine", [GhostEngine, lambda _: VmapEngine()], ids=["ghost", "vmap"])
@pytest.mark.parametrize(
    "coin",
    [
        lambda x: stochastic_depth(x + 1.0, 0.25, "row"),
        lambda x: stochastic_depth(x + 1.0, 0.25, "batch"),
        lambda x: torch.empty(1, 1).bernoulli_(0.75) / 0.75 + 0 * x,
        lambda x: torch.empty([1, 1], dtype=torch.float64).uniform_().lt(0.75).to(x) / 0.75 + 0 * x,
    ],
    ids=["rows", "batches", "bernoulli", "uniform"],
)
def test_each_example_has_a_coin_of_its_own(coin: Any, engine: Any) -> None:
    """torchvision's stochastic depth fills an empty tensor; a quarter of the examples is dropped, the others are scaled."""
    drawn = draws(coin, engine)
    kept = int((drawn > 0).sum())
    torch.testing.assert_close(drawn[drawn > 0], torch.full((kept,), 1 / 0.75))
    assert stats.binomtest(kept, EXAMPLES, 0.75).pvalue > 1e-6
