"""Do all ranks run the same thing on the same data? One draw, and one sum, mean nothing if they do not.

Every check gathers what the ranks have and compares it on each of them, so that all stop with the same sentence and
none is left waiting.
"""

from __future__ import annotations

import hashlib
import inspect
import platform
import random
import re
from collections.abc import Mapping
from importlib.metadata import version
from itertools import zip_longest
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.distributed.gathering import gathered
from lightning_dp.functional.opened import open_containers
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.preflight import PreflightError
from lightning_dp.strategy_facts import world_size_of
from lightning_dp.version import __version__

PROBES = 8
"""So many examples, evenly spaced, are compared between ranks."""

PACKAGES = ("lightning", "torch", "numpy", "prv-accountant")
"""What draws, computes and counts: another version of one of them may draw other examples or stop at another step."""

MOST = 200
"""So much of a value is shown."""

SPEED = ("physical_batch_size", "engine", "static_shapes")
"""Arguments that may differ between ranks, as machines may."""

_REMEDIES = {
    "version": "Install the same environment on every node, for instance from one lock file or one container image.",
    "seed": "Ranks with different seeds draw different samples, in which one example can come twice. Give every rank "
    "the same number, or None for one secret key for all.",
    "len(dataset)": "Load the whole dataset on each rank; sampling divides it among them.",
    "steps already charged": "Every rank has to read the same checkpoint: put it where all nodes see it.",
}
_REMEDY = "Start every rank with the same arguments and data."


def facts(callback: pl.Callback, trainer: pl.Trainer) -> dict[str, object]:
    """What must be the same on every rank before anything is planned, by name.

    The versions of what draws, computes and counts, the number of ranks, the Trainer's idea of the end, and the
    callback's arguments, but for those that change speed alone.
    """
    own = {"python": ".".join(platform.python_version_tuple()[:2]), "lightning_dp": __version__}
    arguments = [name for name in inspect.signature(type(callback).__init__).parameters if name not in ("self", *SPEED)]
    return {
        **{f"version of {name}": text for name, text in {**own, **{name: version(name) for name in PACKAGES}}.items()},
        "number of ranks": trainer.world_size,
        **{name: getattr(trainer, name) for name in ("max_steps", "max_epochs", "limit_train_batches", "precision")},
        "gather": getattr(trainer.strategy, "gather", "step"),
        **{name: getattr(callback, name, None) for name in arguments},
    }


def check_same_on_every_rank(strategy: Strategy, facts: Mapping[str, object]) -> None:
    """Compare public facts about the run between the ranks. A collective call; every rank stops if any differs.

    Args:
        strategy: whose ranks.
        facts: name → a small value with a telling ``repr``, the same names on every rank.

    Raises:
        PreflightError: a value differs; the message names it, both values, a rank that has each, and the remedy.
    """
    of_rank = gathered(strategy, {name: re.sub(r" at 0x\w+", "", repr(value)) for name, value in facts.items()})
    for name, first in of_rank[0].items():
        for rank, theirs in enumerate(of_rank):
            other = theirs.get(name, "nothing")
            if other != first:
                remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), _REMEDY)
                raise PreflightError(
                    f"{name} differs between ranks: {first[:MOST]} on rank 0, {other[:MOST]} on rank {rank}: expected the "
                    f"same on all {len(of_rank)}. {remedy}"
                )


def check_same_data_on_every_rank(strategy: Strategy, dataset: Any) -> None:
    """Compare digests of a few examples between the ranks. A collective call; nothing leaves the ranks.

    Args:
        strategy: whose ranks. With one there is nothing to do.
        dataset: map-style, as long on every rank; examples are read with all global random generators seeded alike.

    Raises:
        PreflightError: a rank's examples differ from rank 0's, as after a random split with another seed.
        HeldRecordsError: records are held that were not divided among these ranks.
    """
    if isinstance(dataset, HeldRecords):
        dataset.check_ranks(world_size_of(strategy))  # it has compared them when it read them
        return
    if world_size_of(strategy) == 1:
        return
    indices = sorted({int(index) for index in np.linspace(0, len(dataset) - 1, PROBES)})
    of_rank = gathered(strategy, [_digest(dataset, index) for index in indices])
    for rank, theirs in enumerate(of_rank):
        for index, own, reference in zip(indices, theirs, of_rank[0], strict=True):
            if own != reference:
                raise PreflightError(
                    f"dataset[{index}] differs between rank 0 and rank {rank}: expected the same dataset in the same order "
                    "on every rank. The step's one draw is divided among the ranks by index, so an example could be drawn "
                    "twice. Give random_split (or whatever orders the data) a fixed generator, or call L.seed_everything "
                    "before the data are set up."
                )


def check_same_parameters_on_every_rank(strategy: Strategy, module: nn.Module) -> None:
    """Compare names, shapes and trainability of the parameters between the ranks. A collective call.

    The ranks' gradients are added up as one flat vector, so their parameters must come in the same order.

    Args:
        strategy: whose ranks.
        module: complete, with what is frozen frozen.

    Raises:
        PreflightError: a rank's parameters differ from rank 0's.
    """
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()]
    of_rank = gathered(strategy, mine)
    for rank, theirs in enumerate(of_rank):
        odd = next((a for a, b in zip_longest(theirs, of_rank[0]) if a != b), None)
        if theirs != of_rank[0]:
            raise PreflightError(
                f"parameters differ between rank 0 and rank {rank}, first at {odd}: expected the same names, shapes and "
                "frozen parts in the same order on every rank, whose gradients are added up. Build the module from the "
                "same configuration everywhere, and order by lists rather than sets."
            )


def _digest(dataset: Any, index: int) -> str:
    with isolate_rng():
        torch.manual_seed(index)
        np.random.seed(index)  # noqa: NPY002 (the generator that people's datasets use is the legacy one)
        random.seed(index)
        example = dataset[index]
    hashed = hashlib.sha256()
    for leaf in pytree.tree_leaves(open_containers(example)):
        hashed.update(_content(leaf))
    return hashed.hexdigest()


def _content(leaf: Any) -> bytes:
    """What identifies a leaf on every rank; of an object without a comparable content, its type alone."""
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(leaf, np.ndarray):
        return leaf.tobytes()
    return repr(leaf).encode() if isinstance(leaf, (str, bytes, int, float)) else type(leaf).__name__.encode()
