"""The release of a sample: charged first, then summed over the ranks, noised and divided."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from lightning_dp.accounting import Ledger
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.release import Released, release
from lightning_dp.mechanism.state import MechanismState
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.lost_ranks import naming_lost_ranks
from lightning_dp.ranks.sharding import collective_of
from lightning_dp.ranks.world import World


def release_sample(
    world: World,
    module: nn.Module,
    gradient: Mapping[str, Tensor],
    ledger: Ledger,
    key: RandomKey,
    step: int,
    state: MechanismState,
    *,
    layers: Layerwise | None = None,
    part: int = 0,
    parts: int = 1,
) -> Released:
    """Charge for a sample at its first release, and give the noisy gradient that may be used and published.

    Args:
        world: whose ranks' sums are added up.
        module: whose parameters the gradient is of.
        gradient: this rank's sum of clipped gradients.
        ledger: is charged, and holds the plan.
        key: of the run.
        step: the sample's number.
        state: what the mechanism has carried here.
        layers: what reduces layer by layer, if parameters are sharded and gathered so.
        part: the release's number among those of the sample, from 0.
        parts: how many the sample makes at most. The noise is √parts as large, so that together they cost one.

    Returns:
        The gradient by name, what the mechanism carries on, and how large the noise is.

    Raises:
        BudgetExceededError: the step would overspend the target ε. Nothing is released.
        RankLostError: another rank is gone. The step is charged, and nothing of it is used.
    """
    if part == 0:
        ledger.charge()
    else:  # noise of its own
        key = RandomKey(key.derive(Stream.NOISE, step, part), key.mode)
    mechanism = of_part(ledger.plan.mechanism, parts)
    collective = collective_of(world, module, gradient) if layers is None else layers.collective()
    with naming_lost_ranks(world, step):
        return release(gradient, mechanism, key, step, collective, state, ledger.begun_at)


def of_part(mechanism: Mechanism, parts: int) -> Mechanism:
    """The mechanism of each of ``parts`` releases of one sample, that together cost one."""
    if parts == 1:
        return mechanism
    return mechanism.but(noise_multiplier=mechanism.noise.noise_multiplier * math.sqrt(parts))
