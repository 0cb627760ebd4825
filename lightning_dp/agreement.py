"""Do all ranks sample from the same data? One global draw means nothing if index 5 is another example on each rank."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
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


def _digest(dataset: Any, index: int) -> str:
    with isolate_rng():
        torch.manual_seed(index)
        np.random.seed(index)  # noqa: NPY002 (the generator that people's datasets use is the legacy one)
        random.seed(index)
        example = dataset[index]
    hashed = hashlib.sha256()
    for leaf in pytree.tree_leaves(example):
        content = (
            leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            if isinstance(leaf, Tensor)
            else None
        )
        hashed.update(content if content is not None else repr(leaf).encode())
    return hashed.hexdigest()
