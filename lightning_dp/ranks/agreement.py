"""Do all ranks run the same thing on the same data? One draw, and one sum, mean nothing if they do not.

Every check gathers what the ranks have and compares it on each of them, so that all stop with the same sentence and
none is left waiting.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest

import lightning.pytorch as pl
from torch import nn

from lightning_dp.errors import PreflightError
from lightning_dp.ranks.gathering import gathered
from lightning_dp.ranks.world import World
from lightning_dp.version import __version__

PACKAGES = ("lightning", "torch", "numpy", "prv-accountant")
"""What draws, computes and counts: another version of one of them may draw other examples or stop at another step."""

MOST = 200
"""So much of a value is shown."""

_REMEDIES = {
    "version": "Install the same environment on every node, for instance from one lock file or one container image.",
    "seed": "Ranks with different seeds draw different samples, in which one example can come twice. Give every rank "
    "the same number, or None for one secret key for all.",
    "len(dataset)": "Load the whole dataset on each rank; sampling divides it among them.",
    "steps already charged": "Every rank has to read the same checkpoint: put it where all nodes see it.",
}
_REMEDY = "Start every rank with the same arguments and data."


def facts(asked: Mapping[str, object], trainer: pl.Trainer, world: World) -> dict[str, object]:
    """What must be the same on every rank before anything is planned, by name.

    The versions of what draws, computes and counts, the number of ranks, the Trainer's idea of the end, and what is asked for.

    Args:
        asked: the settings but for those that change speed alone: ranks may differ in these, as machines do.
        trainer: of this rank.
        world: the ranks.
    """
    own = {"python": ".".join(platform.python_version_tuple()[:2]), "lightning_dp": __version__}
    return {
        **{f"version of {name}": text for name, text in {**own, **{name: version(name) for name in PACKAGES}}.items()},
        "number of ranks": world.size,
        **{name: getattr(trainer, name) for name in ("max_steps", "max_epochs", "limit_train_batches", "precision")},
        "gather": world.gather,
        **asked,
    }


def check_same_on_every_rank(world: World, facts: Mapping[str, object]) -> None:
    """Compare public facts about the run between the ranks. A collective call; every rank stops if any differs.

    Args:
        world: whose ranks.
        facts: name → a small value with a telling ``repr``, the same names on every rank.

    Raises:
        PreflightError: a value differs; the message names it, both values, a rank that has each, and the remedy.
    """
    of_rank = gathered(world, {name: re.sub(r" at 0x\w+", "", repr(value)) for name, value in facts.items()})
    for name, first in of_rank[0].items():
        for rank, theirs in enumerate(of_rank):
            other = theirs.get(name, "nothing")
            if other != first:
                remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), _REMEDY)
                raise PreflightError(
                    f"{name} differs between ranks: {first[:MOST]} on rank 0, {other[:MOST]} on rank {rank}: expected the "
                    f"same on all {len(of_rank)}. {remedy}"
                )


def check_same_parameters_on_every_rank(world: World, module: nn.Module) -> None:
    """Compare names, shapes and trainability of the parameters between the ranks. A collective call.

    The ranks' gradients are added up as one flat vector, so their parameters must come in the same order.

    Args:
        world: whose ranks.
        module: complete, with what is frozen frozen.

    Raises:
        PreflightError: a rank's parameters differ from rank 0's.
    """
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()]
    of_rank = gathered(world, mine)
    for rank, theirs in enumerate(of_rank):
        odd = next((a for a, b in zip_longest(theirs, of_rank[0]) if a != b), None)
        if theirs != of_rank[0]:
            raise PreflightError(
                f"parameters differ between rank 0 and rank {rank}, first at {odd}: expected the same names, shapes and "
                "frozen parts in the same order on every rank, whose gradients are added up. Build the module from the "
                "same configuration everywhere, and order by lists rather than sets."
            )
