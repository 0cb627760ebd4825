"""Do the parts of several ranks make the one draw, and the one noise, of a run? Asked without starting them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_dp.loading.draws import Draws
from lightning_dp.mechanism.noise import BLOCK
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.ranks.world import World
from lightning_dp.step import sample_release

RANKS = (2, 3)
_PLAN = PrivacyPlan(noise_multiplier=1.5, clip_norm=0.8, delta=1e-5, dataset_size=4096, expected_batch_size=1024)


def rank_fault(seed: int, steps: int = 3) -> str | None:
    """What is wrong with the parts that two or three ranks take of a step, in words; ``None`` if nothing is.

    Args:
        seed: of the key.
        steps: of how many steps draws are looked at.
    """
    key, size = RandomKey.from_seed(seed), _PLAN.dataset_size
    for world in RANKS:
        for step in range(steps):
            whole = Draws(range(size), _PLAN, key, 0, 1, None).at(step)[0]
            parts = [Draws(range(size), _PLAN, key, rank, world, None).at(step)[0] for rank in range(world)]
            if not np.array_equal(np.sort(np.concatenate(parts)), whole):
                return (
                    f"{world} ranks draw {sum(map(len, parts))} examples in step {step} that are not the {len(whole)} of the "
                    "one global draw: expected each drawn example on exactly one rank"
                )
    of_step: Any = sample_release  # by the names that a step calls
    module = nn.Linear(BLOCK + 7, 2, bias=False, device="meta")
    sums = {"weight": torch.zeros(2, BLOCK + 7, dtype=torch.float64)}

    def noise(rank: int, world: int) -> torch.Tensor:
        collective = of_step.collective_of(World(rank, world, torch.device("cpu")), module, sums)
        released: torch.Tensor = of_step.release(sums, _PLAN.mechanism, key, 0, collective)[0]["weight"]
        return released

    whole_noise = noise(0, 1)
    for world in RANKS:
        apart = float((sum((noise(rank, world) for rank in range(world)), start=-whole_noise)).norm())
        if not apart <= 1e-6 * float(whole_noise.norm()):
            return (
                f"the noise of {world} ranks together is not that of one process: expected it exactly once in the sum"
            )
    first, second = whole_noise.reshape(-1)[:BLOCK], whole_noise.reshape(-1)[BLOCK : 2 * BLOCK]
    if float((first - second).norm()) < 0.5 * float(first.norm()):
        return "two blocks of coordinates hold the same noise: expected independent numbers in every coordinate"
    return None
