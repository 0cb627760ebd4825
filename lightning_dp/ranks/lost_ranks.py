"""When ranks do not meet, or a collective call fails: which of them are missing?"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_dp.ranks.world import World

PATIENCE = timedelta(seconds=10)
"""So long the others have to say that they are there."""


class RankLostError(RuntimeError):
    """A rank died or can no longer be reached, and this one ends too; nothing of the step is used."""


_NAMING: ContextVar[bool] = ContextVar("naming_lost_ranks", default=False)
"""Inside :func:`naming_lost_ranks` already."""


@contextmanager
def naming_lost_ranks(world: World, step: int | None = None) -> Iterator[None]:
    """Around collective calls: turn the backend's error into one that says which ranks are missing.

    A rank whose call fails says so in the store through which the processes have met, and waits a while for the others
    to do the same. With gloo the call fails at once when a process dies, and after the process group's timeout
    (``DDPStrategy(timeout=...)``) when a machine goes silent. NCCL may end the process itself, with its own message.

    Inside another of its kind it does nothing, so that the innermost call can be named by the outermost.

    Args:
        world: whose ranks.
        step: of the run, if it is charged already; ``None`` before the first step and between steps.

    Raises:
        RankLostError: the call failed and some rank did not answer. If all do, the backend's own error.
    """
    if _NAMING.get():
        yield
        return
    token = _NAMING.set(True)
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if world.size == 1 or not dist.is_initialized():
            raise
        silent = _silent(world)
        if not silent:
            raise
        when, spent = ("outside a step's release", "What was released before is charged, and nothing else")
        if step is not None:
            when, spent = f"of step {step}", "The step is charged and nothing of it is used"
        raise RankLostError(
            f"{', '.join(f'rank {rank}' for rank in silent)} of {world.size} did not answer within "
            f"{PATIENCE.total_seconds():g} s after a collective call {when} failed on rank {world.rank} "
            f"({socket.gethostname()}): expected every rank to be there. {spent}. Look "
            "into that rank's own log, and resume from the last checkpoint (ckpt_path='last'), as torchrun "
            f"--max-restarts does. The backend said: {next(iter(str(error).splitlines()), type(error).__name__)}"
        ) from error
    finally:
        _NAMING.reset(token)


@contextmanager
def naming_absent_nodes(nodes: int, devices: int) -> Iterator[None]:
    """Around the processes' first meeting: say what was waited for.

    Args:
        nodes: ``num_nodes`` of the Trainer.
        devices: processes on each.

    Raises:
        RankLostError: not all processes came within the process group's timeout.
    """
    try:
        yield
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankLostError(
            f"num_nodes={nodes} with {devices} processes each: not all of the {nodes * devices} came to {where} in time: "
            "expected each node to start the same program with the same num_nodes, and to reach that address. Look "
            "whether every node is up, whether a firewall is in between, and which network interface is taken "
            "(GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME); for slow starts raise private_ddp's timeout. The backend said: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _silent(world: World) -> list[int]:
    """The ranks that do not say that they are there; rank 0, if the store is gone with it.

    They need not have failed in the same call: what one rank could still finish, another could not.
    """
    here = world.rank
    silent: list[int] = []
    try:
        store = dist.distributed_c10d._get_default_store()
        store.set(_name(here), "here")
        for rank in range(world.size):
            try:
                store.wait([_name(rank)], PATIENCE if not silent else timedelta(seconds=1))
            except dist.DistStoreError:
                silent.append(rank)
    except dist.DistNetworkError:
        return [0]
    return silent


def _name(rank: int) -> str:
    return f"lightning_dp/here/{rank}"
