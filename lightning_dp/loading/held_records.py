"""Records of shards that can only be read from beginning to end, held in memory where they can be drawn one by one."""

from __future__ import annotations

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Dataset

SKETCH = 4096
"""So many of a rank's records, those with the smallest digests, are compared with the other ranks' smallest."""


class HeldRecordsError(ValueError):
    """The shards do not make one dataset over the ranks."""


class HeldRecords(Dataset[Any]):
    """A dataset whose records are spread over the ranks: each reads its shards once, and holds their records in memory.

    Poisson sampling needs to reach any record at any step. A stream cannot be reached into, and what a shuffle buffer
    draws from it is neither independent nor drawn with a known probability. Held in memory, records can be drawn: all
    ranks make the one draw over the N records of all shards, and each takes those that it holds. So a record is drawn
    with probability q, independently of all others, and at the same steps at any number of ranks.

    Make it on every rank once the processes have met, in the DataModule's ``setup`` or ``train_dataloader``, and give it
    to ``DataLoader`` as it is: ``Subset`` and ``random_split`` would index records that another rank holds. Every rank
    needs about as many records as the others, or it is the one they wait for.

    Args:
        shards: what to read, such as paths; the same list in the same order on every rank. Rank r reads ``shards[r::W]``.
        read: from a shard to its records, in a fixed order. Transforms belong here if they are to be done once, and into
            the DataLoader's ``collate_fn`` if not.
        copies: ``"refuse"`` stops if a record of one rank is found on another too, as when ``read`` returns more than its
            shard. ``"count"`` takes every copy for a record of its own, as in any dataset with repetitions: what
            ε then says is about one copy.

    Raises:
        HeldRecordsError: a shard is empty or cannot be read, ranks have other shards, or records are on two ranks.

    Example:
        >>> records = HeldRecords(["0 1 2", "3 4"], lambda shard: map(int, shard.split()))
        >>> len(records), records[3]
        (5, 3)
    """

    def __init__(
        self,
        shards: Sequence[Any],
        read: Callable[[Any], Iterable[Any]],
        copies: Literal["refuse", "count"] = "refuse",
    ) -> None:
        if copies not in ("refuse", "count"):
            raise HeldRecordsError(f"copies={copies!r}: expected 'refuse' or 'count'.")
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._records: list[Any] = []
        sizes: dict[int, int] = {}
        failure = ""
        for number in range(self.rank, len(shards), self.world_size):
            try:
                found = list(read(shards[number]))
            except Exception as error:
                failure = f"shard {shards[number]!r} on rank {self.rank}: {type(error).__name__}: {error}"
                break
            sizes[number] = len(found)
            self._records += found
        of_rank = _gathered((failure, hashlib.sha256(repr(list(shards)).encode()).digest(), sizes), self.world_size)
        _check(shards, of_rank)
        if copies == "refuse" and len({repr(shard) for shard in shards}) < len(shards):
            raise HeldRecordsError(
                f"{len(shards)} shards, not all of them different: expected each shard once. Remove repetitions from the list; "
                "if they are to count as records of their own, give copies='count'."
            )
        if copies == "refuse" and self.world_size > 1:
            _check_no_copies(_gathered(_sketch(self._records), self.world_size))
        together = {number: size for _, _, theirs in of_rank for number, size in theirs.items()}
        starts = np.concatenate([[0], np.cumsum([together[number] for number in range(len(shards))])])
        self._size = int(starts[-1])
        self.here: npt.NDArray[np.int64] = np.concatenate(
            [np.arange(starts[number], starts[number] + size, dtype=np.int64) for number, size in sizes.items()]
        )

    def __len__(self) -> int:
        """N, the number of records of all ranks together."""
        return self._size

    def __getitem__(self, index: int) -> Any:
        """The record with this number among those of all ranks.

        Raises:
            IndexError: another rank holds it.
        """
        place = int(np.searchsorted(self.here, index))
        if place == len(self.here) or self.here[place] != index:
            raise IndexError(
                f"record {index} is not held by rank {self.rank}: expected an index of this rank's own records. Give "
                "HeldRecords to the DataLoader as it is, without Subset or random_split, and train with DifferentialPrivacy."
            )
        return self._records[place]

    def held(self, drawn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Those of the sorted indices ``drawn`` whose records this rank holds, sorted."""
        places = np.minimum(np.searchsorted(self.here, drawn), len(self.here) - 1)
        mine: npt.NDArray[np.int64] = drawn[self.here[places] == drawn]
        return mine

    def check_ranks(self, world_size: int) -> None:
        """Refuse records that were read before the ranks had met.

        Raises:
            HeldRecordsError: these ranks are not those among which the shards were divided.
        """
        if world_size != self.world_size:
            raise HeldRecordsError(
                f"HeldRecords of {self.world_size} ranks in a run of {world_size}: expected the same, or records would count "
                "on several ranks. Make it where the ranks have met: in the DataModule's setup or train_dataloader."
            )


def _check(shards: Sequence[Any], of_rank: list[tuple[str, bytes, dict[int, int]]]) -> None:
    for failure, _, _ in of_rank:
        if failure:
            raise HeldRecordsError(f"{failure}: expected every shard to be readable. Check it, or leave it out.")
    for rank, (_, digest, _) in enumerate(of_rank):
        if digest != of_rank[0][1]:
            raise HeldRecordsError(
                f"shards differ between rank 0 and rank {rank}: expected the same list in the same order on every rank, of "
                "which each reads its own part. Sort what a directory listing gives, and do not split it by rank yourself."
            )
    if len(shards) < len(of_rank):
        raise HeldRecordsError(
            f"{len(shards)} shards for {len(of_rank)} ranks: expected at least one for each. Write more, smaller shards."
        )
    empty = [number for _, _, sizes in of_rank for number, size in sizes.items() if size == 0]
    if empty:
        raise HeldRecordsError(f"shard {shards[min(empty)]!r} holds no record: expected at least one. Leave it out.")


def _check_no_copies(sketches: list[npt.NDArray[np.uint64]]) -> None:
    counted = Counter(int(digest) for sketch in sketches for digest in set(sketch.tolist()))
    twice = sum(times > 1 for times in counted.values())
    if twice:
        raise HeldRecordsError(
            f"{twice} of {len(counted)} records compared are on more than one rank: expected each record on one rank only, or "
            "it would count several times in a step. Let read return the records of its own shard, and list each shard once; "
            "if the data contain repetitions that are to count as records of their own, give copies='count'."
        )


def _sketch(records: list[Any]) -> npt.NDArray[np.uint64]:
    """The smallest digests of the records' contents: what is on two ranks is small on both."""
    digests = [hashlib.blake2b(pickle.dumps(_alone(record)), digest_size=8).digest() for record in records]
    return np.sort(np.frombuffer(b"".join(digests), dtype=np.uint64))[:SKETCH]


def _alone(record: Any) -> Any:
    """The record with the content of its tensors alone: torch's own pickles differ from process to process."""

    def content(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return str(leaf.dtype), tuple(leaf.shape), leaf.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()

    return pytree.tree_map(content, record)


def _gathered(mine: Any, world_size: int) -> list[Any]:
    everything = [mine] * world_size
    if world_size > 1:
        dist.all_gather_object(everything, mine)
    return everything
