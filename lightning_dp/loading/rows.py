"""Has every drawn example come back from ``collate_fn``?"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import BatchAxisError, is_list_of_values


class DroppedExamplesError(BatchAxisError):
    """``collate_fn`` has left examples out."""


def rows_in(batch: Any) -> int | None:
    """How many rows all parts of an opened batch have; ``None`` if they differ, or if there is none."""
    leaves = pytree.tree_leaves(batch, is_leaf=is_list_of_values)
    counts = {len(leaf) for leaf in leaves if (isinstance(leaf, Tensor) and leaf.ndim > 0) or is_list_of_values(leaf)}
    return counts.pop() if len(counts) == 1 else None


def check_all_came(batch: Any, examples: int) -> None:
    """Refuse a batch with fewer rows than examples were collated: nobody can tell whose rows are left.

    Args:
        batch: opened, with its examples on the first axis.
        examples: how many were given to ``collate_fn``.

    Raises:
        DroppedExamplesError: some are missing.
    """
    rows = rows_in(batch)
    if rows is not None and rows < examples:
        raise DroppedExamplesError(dropped(f"{rows} rows for {examples} examples"))


def dropped(found: str) -> str:
    """The sentence for a ``collate_fn`` that leaves examples out, as in ``[x for x in batch if x is not None]``."""
    return (
        f"collate_fn returned {found}: expected a row for each. It leaves examples out (broken ones, duplicates, what does not "
        "fill a batch), and a run that ends when one of them is drawn tells that it is there. Leave them out of the dataset "
        "before training, as in torch.utils.data.Subset(dataset, [i for i in range(len(dataset)) if is_good(dataset[i])]), and "
        "let collate_fn keep what it is given."
    )
