"""Reads that are repeated with the same random numbers: they must give the same, whatever was read in between."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_dp.errors import PreflightError
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.loading.kept_by_data import KeptByData
from lightning_dp.loading.likeness import alike
from lightning_dp.loading.own_generators import own_generators, put_back, reseed
from lightning_dp.loading.reading import read
from lightning_dp.loading.row_wise import draws_nothing
from lightning_dp.mechanism.seeded_globals import globals_put_back, seed_globals

FEW, MORE = 4, 32
"""So many examples are read before training, and so many if reading changes anything that the data set keeps."""

OFTEN = 64
"""In one of so many micro-batches a read is repeated."""


def check_reads(loader: DataLoader[Any], row_wise: tuple[str, ...]) -> None:
    """Before anything else reads the data: a few examples are read, and then again in the opposite order.

    Args:
        loader: the user's.
        row_wise: what the user vouches for.

    Raises:
        PreflightError: what is made of an example depends on what was read before it.
    """
    dataset: Any = loader.dataset
    if "__getitem__" in row_wise or isinstance(dataset, HeldRecords) or draws_nothing(dataset) or not len(dataset):
        return

    def again(index: int) -> Any:
        for _ in range(2):
            seed_globals(index)
            generators = own_generators(dataset)
            reseed(generators, index)
            record = read(dataset, [index])
            if len(own_generators(dataset)) == len(generators):
                break  # else one was made on the way, and has drawn without a seed
        return record

    kept, found = KeptByData(dataset), {}
    with globals_put_back(), put_back(own_generators(dataset)):
        for count in (FEW, MORE):
            for index in np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int).tolist():
                kept.look()
                try:
                    found[index] = out_of_reach(again(index))
                except PreflightError:
                    raise
                except Exception:
                    continue  # training itself will tell
                kept.check(index, again, afresh=True)
            if not kept.has_changed:
                break
        for index in found if kept.has_changed else ():  # with caches that fill up
            kept.look()
            again(index)
            kept.check(index, again)
        for index, record in reversed(found.items()):
            check_repeats(index, record, partial(again, index))


def check_repeats(index: int, record: Any, again: Callable[[], Any]) -> None:
    """Read an example once more, and compare.

    Args:
        index: of the data set, for nobody but a comparison: it is private, and not in the message.
        record: a copy of what the read has given before.
        again: reads it, with the same random numbers.

    Raises:
        PreflightError: the two differ, and two reads in a row do not.
    """
    if record is None or alike(record, now := again()):
        return
    now = out_of_reach(now)
    if now is None or not alike(now, again()):
        rank_zero_warn(
            "An example that is read twice with the same random numbers gives different values: expected the same. Either "
            "the data set draws from a generator that is not seeded here (OpenCV's, the operating system's), which does no "
            "harm; or what it makes of an example depends on others that it has read, and (epsilon, delta) does not hold. Draw "
            "from torch, NumPy or random."
        )
        return
    raise PreflightError(
        "what the data set makes of an example depends on what was read before it: expected it to follow from the example and "
        "its random numbers. What is kept of one example would reach others, past every clip norm. Compute statistics from "
        "public data before training, and leave records alone once they are read (they may be shared with a cache)."
    )


def out_of_reach(record: Any) -> Any:
    """A copy that later reads cannot reach, or ``None`` if there is none."""
    try:
        return copy.deepcopy(record)
    except Exception:
        return None
