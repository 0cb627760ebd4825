"""Do all ranks hold the same data and parameters? One draw, and one sum, mean nothing if they do not."""

from __future__ import annotations

import hashlib
import random
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.preflight import PreflightError

PROBES = 8
"""So many examples, evenly spaced, are compared between ranks."""


def check_same_data_on_every_rank(strategy: Strategy, dataset: Any) -> None:
    """Compare digests of a few examples between this rank and rank 0. A collective call; nothing leaves the ranks.

    Args:
        strategy: for its ranks and its broadcast. With one rank there is nothing to do.
        dataset: map-style; examples are read with all global random generators seeded alike.

    Raises:
        PreflightError: this rank's examples differ from rank 0's, as after a random split with another seed.
    """
    if int(getattr(strategy, "world_size", 1)) == 1:
        return
    indices = sorted({int(index) for index in np.linspace(0, len(dataset) - 1, PROBES)})
    mine = [_digest(dataset, index) for index in indices]
    theirs = strategy.broadcast(mine)
    for index, own, reference in zip(indices, mine, theirs, strict=True):
        if own != reference:
            raise PreflightError(
                f"dataset[{index}] differs between rank 0 and rank {int(getattr(strategy, 'global_rank', 0))}: expected the "
                "same dataset in the same order on every rank. The step's one draw is divided among the ranks by index, so "
                "an example could be drawn twice. Give random_split (or whatever orders the data) a fixed generator, or "
                "call L.seed_everything before the data are set up."
            )


def check_same_parameters_on_every_rank(strategy: Strategy, module: nn.Module) -> None:
    """Compare names, shapes and trainability of the parameters with rank 0's. A collective call.

    The ranks' gradients are added up as one flat vector, so their parameters must come in the same order.

    Args:
        strategy: for its ranks and its broadcast. With one rank there is nothing to do.
        module: complete, with what is frozen frozen.

    Raises:
        PreflightError: this rank's parameters differ from rank 0's.
    """
    if int(getattr(strategy, "world_size", 1)) == 1:
        return
    mine = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()]
    theirs = strategy.broadcast(mine)
    if mine != theirs:
        odd = next((a for a, b in zip_longest(mine, theirs) if a != b), None)
        raise PreflightError(
            f"parameters differ between rank 0 and rank {int(getattr(strategy, 'global_rank', 0))}, first at {odd}: expected "
            "the same names, shapes and frozen parts in the same order on every rank, whose gradients are added up. Build "
            "the module from the same configuration everywhere, and order by lists rather than sets."
        )


def _digest(dataset: Any, index: int) -> str:
    with isolate_rng():
        torch.manual_seed(index)
        np.random.seed(index)  # noqa: NPY002 (the generator that people's datasets use is the legacy one)
        random.seed(index)
        example = dataset[index]
    hashed = hashlib.sha256()
    for leaf in pytree.tree_leaves(example):
        hashed.update(_content(leaf))
    return hashed.hexdigest()


def _content(leaf: Any) -> bytes:
    """What identifies a leaf on every rank; of an object without a comparable content, its type alone."""
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(leaf, np.ndarray):
        return leaf.tobytes()
    return repr(leaf).encode() if isinstance(leaf, (str, bytes, int, float)) else type(leaf).__name__.encode()
