"""The run's key, the same on every rank."""

from __future__ import annotations

from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.ranks.world import World


def shared_key(world: World, seed: int | None, changed: str = "") -> RandomKey:
    """The key from the seed, or from rank 0's operating-system entropy, written nowhere. A collective call.

    Args:
        world: whose ranks.
        seed: ``None`` for a secret key.
        changed: see :meth:`~lightning_dp.mechanism.randomness.RandomKey.from_seed`.
    """
    if seed is not None:
        return RandomKey.from_seed(seed, changed)
    return RandomKey(world.broadcast(RandomKey.fresh().reveal()), "secret")
