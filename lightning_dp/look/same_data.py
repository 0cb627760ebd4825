"""Do all ranks hold the same dataset in the same order? The step's one draw is divided among them by index."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import open_containers
from lightning_dp.errors import PreflightError
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.loading.reading import item, order
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.ranks.gathering import gathered, on_every_rank
from lightning_dp.ranks.world import World

PROBES, READS = 8, 2
"""So many examples, evenly spaced, are compared between ranks, each read so often."""

MORE_PROBES, MORE_READS = 32, 4
"""The same where something differs: between ranks, or from one time to the next."""

Content = Mapping[str, str | None]
"""Of one example: the digest of each part, by its path; ``None`` if it was another at every time."""

_REMEDY = (
    "expected the same dataset in the same order on every rank. The step's one draw is divided among the ranks by index, so "
    "an example could be drawn twice. Give random_split (or whatever orders the data, such as numpy's permutation) a generator "
    "with a fixed seed, or call L.seed_everything before the data are set up; if the data are loaded anew during the run, seed "
    "them by the epoch's number."
)


def check_same_data_on_every_rank(world: World, dataset: Any) -> None:
    """Compare digests of a few examples between the ranks. A collective call; nothing leaves the ranks.

    To be called for every loader: data that are loaded anew are ordered anew. Of torch's ``Subset`` all indices are compared.
    What differs from one time of reading to the next, as in a dataset with a random generator of its own, says nothing
    about the order, and is left out.

    Args:
        world: whose ranks. With one there is nothing to do.
        dataset: map-style, as long on every rank; examples are read with all global random generators seeded alike.

    Raises:
        PreflightError: a rank's examples differ from rank 0's, as after a random split with another seed.
        HeldRecordsError: records are held that were not divided among these ranks.
    """
    if isinstance(dataset, HeldRecords):
        dataset.check_ranks(world.size)  # it has compared them when it read them
        return
    if world.size == 1:
        return
    indices, of_rank = _gather(world, dataset, PROBES, READS)
    random_parts = _random(of_rank)
    if random_parts or _first_difference(indices, of_rank, random_parts) is not None:
        indices, of_rank = _gather(world, dataset, MORE_PROBES, MORE_READS)
        random_parts |= _random(of_rank)
    found = _first_difference(indices, of_rank, random_parts)
    if found is not None:
        raise PreflightError(f"dataset[{found[0]}] differs between rank 0 and rank {found[1]}: {_REMEDY}")
    orders = gathered(world, order(dataset))
    odd = next((rank for rank, theirs in enumerate(orders) if theirs != orders[0]), None)
    if odd is not None:
        raise PreflightError(f"the indices of dataset=Subset differ between rank 0 and rank {odd}: {_REMEDY}")
    if all(set(content) <= random_parts for probes in of_rank for content in probes):
        rank_zero_warn(
            f"dataset={type(dataset).__name__} is another at every time of reading, so whether its order is the same on all "
            f"{len(of_rank)} ranks could not be looked at: expected it to be, or an example could be drawn twice. Order the "
            "data with a fixed seed, and let only what is done to each example be random."
        )


def _gather(world: World, dataset: Any, probes: int, times: int) -> tuple[list[int], list[list[Content]]]:
    """The indices that were read, and what each rank found at them."""
    indices = sorted({int(index) for index in np.linspace(0, len(dataset) - 1, probes)})
    mine = on_every_rank(world, lambda: [_content(dataset, index, times) for index in indices], PreflightError)
    return indices, gathered(world, mine)


def _random(of_rank: Sequence[Sequence[Content]]) -> set[str]:
    """The parts that differed from one time to the next, at some example on some rank."""
    return {path for probes in of_rank for content in probes for path, digest in content.items() if digest is None}


def _first_difference(
    indices: Sequence[int], of_rank: Sequence[Sequence[Content]], leaving_out: set[str]
) -> tuple[int, int] | None:
    """The first example, and the first rank, whose content is not rank 0's."""
    for rank, theirs in enumerate(of_rank):
        for index, own, reference in zip(indices, theirs, of_rank[0], strict=True):
            if any(own.get(path) != reference.get(path) for path in {*own, *reference} - leaving_out):
                return index, rank
    return None


def _content(dataset: Any, index: int, times: int) -> Content:
    found = [_digests(dataset, index) for _ in range(times)]
    return {
        path: found[0].get(path) if all(one.get(path) == found[0].get(path) for one in found) else None
        for path in {path for one in found for path in one}
    }


def _digests(dataset: Any, index: int) -> dict[str, str]:
    with isolate_rng():
        seed_torch(index)
        np.random.seed(index)  # noqa: NPY002 (the generator that people's datasets use is the legacy one)
        random.seed(index)
        example = item(dataset, index)
    return {
        pytree.keystr(path): hashlib.sha256(_bytes(leaf)).hexdigest()
        for path, leaf in pytree.tree_leaves_with_path(open_containers(example))
    }


def _bytes(leaf: Any) -> bytes:
    """What identifies a leaf on every rank; of an object without a comparable content, its type alone."""
    if isinstance(leaf, Tensor):
        leaf = leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    if isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype != object:
        return leaf.tobytes()
    return repr(leaf).encode() if isinstance(leaf, (str, bytes, int, float)) else type(leaf).__name__.encode()
