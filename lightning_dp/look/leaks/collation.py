"""Does ``collate_fn`` give every example a row, and the same row at every time and place?"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate, default_convert

from lightning_dp.errors import PreflightError
from lightning_dp.loading.rows import dropped, rows_in
from lightning_dp.look.leaks.padding import ToBatch, row_contents
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.step.planned import Planned

LOOK = 1.0
"""After so many seconds no further examples are collated to see whether one is left out."""

COMPANY = 8
"""So many are collated to compare their rows."""

AT_ONCE = 32
"""So many are collated together for it at most."""


def check_every_example_has_a_row(planned: Planned) -> None:
    """Refuse a ``collate_fn`` that leaves examples out, before one of them is drawn.

    Examples all over the dataset are collated until all have been, or a second is over. What is never looked at is found
    when it is drawn (:func:`lightning_dp.loading.rows.check_all_came`). torch's own functions leave nothing out.

    Args:
        planned: the run.

    Raises:
        PreflightError: an example has no row.
    """
    loader = planned.loader
    if loader.collate_fn in (default_collate, default_convert):
        return
    begun = time.monotonic()
    with isolate_rng():
        for indices in loader.scattered(min(AT_ONCE, loader.physical_batch_size)):
            rows = _rows(planned, indices)
            if rows is None or rows < len(indices):
                check_not_left_out(planned, indices)
                if rows is not None:
                    raise PreflightError(dropped(f"{rows} rows for {len(indices)} examples"))
            if time.monotonic() - begun > LOOK:
                return


def check_not_left_out(planned: Planned, indices: list[int]) -> None:
    """Refuse if ``collate_fn`` makes a row of some of these examples, and none of others.

    Raises:
        PreflightError: see the message.
    """
    with isolate_rng():
        alone = [_rows(planned, [index]) for index in indices]
        without = [index for index, rows in zip(indices, alone, strict=True) if rows in (None, 0)]
        kept = [index for index, rows in zip(indices, alone, strict=True) if rows == 1]
        if without and kept and _rows(planned, [kept[0], without[0]]) == 1:
            raise PreflightError(dropped(f"no row for dataset[{without[0]}]"))


def check_collate_repeats_itself(collate: ToBatch, records: list[Any], at_once: int) -> None:
    """Refuse a ``collate_fn`` that draws from what is not found to be a generator, or keeps count.

    A few records are collated twice with all generators seeded alike, global ones and those that it holds. What it draws
    otherwise follows from how many rows came before: removing one example would change the rows of all later ones.

    Args:
        collate: the loader's, and the way to the device.
        records: a few of the dataset.
        at_once: so many are collated together at most.

    Raises:
        PreflightError: the rows differ.
    """
    company = records[: min(len(records), at_once, COMPANY)]
    if _contents(collate, company, 0) != _contents(collate, company, 0):
        raise PreflightError(
            "collate_fn or a batch transfer hook made other rows of the same examples the second time, with the random "
            "generators of torch, NumPy and Python seeded alike, global ones and those that it holds: expected it to draw from "
            "those. What it draws or counts otherwise follows from how many rows came before, so one example would change the "
            "rows of others. Let it draw from torch's global generator (as in transformers' data collators with seed=None), "
            "from one that is an attribute of its own, or in the dataset."
        )


def check_collate_forgets_places(collate: ToBatch, records: list[Any], at_once: int) -> None:
    """Refuse a ``collate_fn`` that makes a row of where its example stands, as with a generator seeded in every call.

    A few records are collated in two orders. What the global generators change is left alone: their seeds are nobody's.

    Args:
        collate: the loader's, and the way to the device; it keeps examples apart.
        records: a few of the dataset.
        at_once: so many are collated together at most.

    Raises:
        PreflightError: the rows differ.
    """
    company = records[: min(len(records), at_once, COMPANY)]
    first, other = (_contents(collate, company, seed) for seed in (0, 1))
    turned = _contents(collate, company[1:] + company[:1], 0)
    if first is None or turned is None or first != other or first[1] != turned[1]:
        return
    if first[0] != turned[0]:
        raise PreflightError(
            "collate_fn or a batch transfer hook makes another row of an example at another place in the batch, whatever the "
            "global random generators hold: expected a row that follows from its example alone, not from the first of the "
            "batch either. A generator that is seeded in every call does so, and so does a number of the row: removing one "
            "example would change the rows of those behind it. Draw from torch's global generator without seeding it, and "
            "leave numbers of rows out."
        )


def _rows(planned: Planned, indices: list[int]) -> int | None:
    """How many rows ``collate_fn`` makes of these examples; ``None`` if it fails."""
    loader = planned.loader
    try:
        return rows_in(planned.form.opened(loader.collated(loader.records(indices)), strict=False))
    except Exception:  # of a collate_fn that is left with nothing, as of one that cannot do with these
        return None


def _contents(collate: Callable[[Any], Any], records: list[Any], seed: int) -> tuple[Counter[bytes], Any] | None:
    with isolate_rng():
        seed_torch(seed)
        np.random.seed(seed)  # noqa: NPY002 (the generator that people's functions use is the legacy one)
        random.seed(seed)
        given = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, records)
        return row_contents(collate(given))
