"""What every rank says, told to every rank: so that all of them go on, or all of them stop for the same reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from lightning_dp.ranks.lost_ranks import naming_lost_ranks
from lightning_dp.ranks.world import World

T = TypeVar("T")


def gathered(world: World, mine: T) -> list[T]:
    """What each rank passed, in the order of ranks, on every rank. A collective call; with one rank, ``[mine]``.

    Args:
        world: whose ranks; its processes have met (from Lightning's ``setup`` hooks on).
        mine: small and picklable. It goes to the other ranks and nowhere else.

    Raises:
        RankLostError: a rank is gone.
    """
    if world.size == 1 or not dist.is_initialized():
        return [mine]
    everything: list[T] = [mine] * world.size
    with naming_lost_ranks(world):
        dist.all_gather_object(everything, mine)
    return everything


def on_every_rank(world: World, work: Callable[[], T], error: type[ValueError]) -> T:
    """Do ``work`` on every rank, or fail on every rank: nobody is left waiting for one that gave up.

    Args:
        world: whose ranks.
        work: may raise; must not talk to the other ranks itself.
        error: what the ranks raise that did not fail themselves.

    Returns:
        This rank's result.

    Raises:
        Exception: ``work`` raised it here, or ``error`` with the text of the first rank where it did.
    """
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        failure = raised
    told = gathered(world, None if failure is None else _told(failure))
    if failure is not None:
        raise failure
    for rank, text in enumerate(told):
        if text is not None:
            raise error(f"rank {rank} stopped: {text}")
    return result  # type: ignore[return-value]  # None only if T is: without a failure, work has returned


def on_rank_zero(world: World, make: Callable[[], T]) -> T:
    """Rank 0's result on every rank, or rank 0's error on every rank. A collective call.

    Args:
        world: whose ranks.
        make: called on rank 0 alone; its result is not ``None`` and can be pickled.

    Raises:
        ValueError: ``make`` raised it on rank 0.
    """
    outcome: T | ValueError | None = None
    if world.rank == 0:
        try:
            outcome = make()
        except ValueError as error:
            outcome = error
    outcome = world.broadcast(outcome)
    if isinstance(outcome, ValueError):
        raise outcome
    assert outcome is not None
    return outcome


def _told(failure: Exception) -> str:
    """Its text; of an error that is not of this package or the user's value, its type too."""
    return str(failure) if isinstance(failure, ValueError) else f"{type(failure).__name__}: {failure}"
