"""Batches of which nobody can say which part belongs to which example, and whose examples are collated one by one instead."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import (
    BatchAxisError,
    check_batch_axis,
    holds_no_tensor,
    is_list_of_values,
    unclear_parts,
)
from lightning_dp.loading.reading import Row
from lightning_dp.loading.rows import rows_in

if TYPE_CHECKING:
    from lightning_dp.loading.form import ExampleForm
    from lightning_dp.loading.loader import PoissonLoader

LOOKED_AT = (2, 1, 3)
"""So many records are collated together. A batch of two whose tensors have two rows by chance has not three."""


def collate_each_if_needed(form: ExampleForm, loader: PoissonLoader) -> None:
    """Have every example collated by itself, if the user says so, or if the batch's parts cannot be told apart.

    That is: batches of graphs that are joined into one (an object with ``to_data_list``, or with ``ptr``, where each graph
    begins), objects beside tensors, and parts that are the same whatever the examples are. Tensors and lists of a wrong length
    are left as they are, and refused with what to do: most have their examples on another axis.

    Args:
        form: how a batch comes to the engines.
        loader: whose first examples are looked at, before anything else is read.

    Raises:
        BatchAxisError: parts of a wrong length, or a user brings several examples, which are one batch for training_step.
    """
    reason: str | None = "batch_axis='each'"
    if form.axis != "each":
        try:
            with isolate_rng():
                reason = _why(form, loader)
        except BatchAxisError:
            raise
        except Exception:
            return  # training itself will tell
    if reason is None:
        return
    if loader.units is not None and loader.units.most > 1:
        raise BatchAxisError(
            f"{reason}, and a user brings up to {loader.units.most} examples: expected a batch of which it is clear which part "
            "belongs to whom. Let collate_fn return tensors with one row for each example, or give max_examples_per_unit=1."
        )
    if isinstance(loader.first_records(1)[0], Row):
        raise BatchAxisError(
            f"{reason}, and the dataset's __getitems__ returns columns: expected a list of examples, of which each can be "
            "collated by itself. Let __getitems__ return a list, or leave it out."
        )
    loader.examples.each = True
    if form.axis != "each":
        rank_zero_info(
            f"lightning_dp: {reason}. So every example is collated by itself, and is a batch of its own in training_step. "
            "That takes one backward pass for each; a part that all examples share may be named in "
            "batch_axis={'its name': None}, which is faster, and batch_axis='each' says that this is meant."
        )


def _why(form: ExampleForm, loader: PoissonLoader) -> str | None:
    """Why examples have to be collated one by one, if they have to and can be."""
    records = loader.first_records(max(LOOKED_AT))
    for count in (count for count in LOOKED_AT if count <= min(len(records), loader.physical_batch_size)):
        batch = form.to_engine(loader.collated(records[:count]))
        unclear = unclear_parts(batch, count)
        if not unclear:
            continue
        if (rows := rows_in(batch)) is not None and rows < count:
            return None  # if collate_fn leaves examples out, later looks say so
        alone = [form.to_engine(loader.collated([record])) for record in records[:2]]
        joined = any(where.endswith((".ptr", "['ptr']")) for where, _ in unclear)
        if isinstance(records[0], Row) or (
            not joined
            and not all(
                _is_object(leaf) or (leaf is batch and holds_no_tensor(batch)) or _same(where, [batch, *alone])
                for where, leaf in unclear
            )
        ):
            check_batch_axis(batch, count)
        where, leaf = unclear[0]
        return f"which part of {where}, of type {type(leaf).__name__}, belongs to which example is not known"
    return None


def _is_object(leaf: Any) -> bool:
    return not isinstance(leaf, Tensor) and not is_list_of_values(leaf)


def _same(where: str, batches: list[Any]) -> bool:
    """Whether a part is the same in all of these batches."""
    parts: list[Any] = [dict(_parts(batch)).get(where) for batch in batches]
    if any(isinstance(part, Tensor) for part in parts):
        return all(isinstance(part, Tensor) and torch.equal(part, parts[0]) for part in parts)
    return all(type(part) is type(parts[0]) and bool(part == parts[0]) for part in parts)


def _parts(batch: Any) -> list[tuple[str, Any]]:
    leaves = pytree.tree_leaves_with_path(batch, is_leaf=is_list_of_values)
    return [(f"batch{pytree.keystr(path)}", leaf) for path, leaf in leaves]
