"""The release of a sample: charged first, then summed over the ranks, noised and divided."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.release import release
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.lost_ranks import naming_lost_ranks
from lightning_dp.ranks.sharding import sum_over_ranks
from lightning_dp.ranks.world import World


def release_sample(
    world: World,
    module: nn.Module,
    gradient: Mapping[str, Tensor],
    ledger: Ledger,
    key: RandomKey,
    step: int,
    *,
    layers: Layerwise | None = None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, Tensor]:
    """Charge for a sample at its first release, and give the noisy gradient that may be used and published.

    Args:
        world: whose ranks' sums are added up.
        module: whose parameters the gradient is of.
        gradient: this rank's sum of clipped gradients.
        ledger: is charged, and holds the plan.
        key: of the run.
        step: the sample's number.
        layers: what reduces layer by layer, if parameters are sharded and gathered so.
        part: the release's number among those of the sample, from 0.
        parts: how many the sample makes at most. The noise is √parts as large, so that together they cost one.

    Raises:
        BudgetExceededError: the step would overspend the target ε. Nothing is released.
        RankLostError: another rank is gone. The step is charged, and nothing of it is used.
    """
    if part == 0:
        ledger.charge()
    else:  # noise of its own
        key = RandomKey(key.derive(Stream.NOISE, step, part), key.mode)
    if layers is not None:
        return layers.released(gradient, ledger.plan, key, step)
    plan = ledger.plan
    if parts > 1:
        plan = plan.but(noise_multiplier=plan.noise_multiplier * math.sqrt(parts))
    add_up, unflatten = sum_over_ranks(world, module, gradient)
    with naming_lost_ranks(world, step):
        return release(
            gradient,
            plan,
            key,
            step,
            rank=world.rank,
            world_size=world.size,
            all_reduce_sum=add_up,
            unflatten=unflatten,
        )
