"""Does ``collate_fn`` keep examples apart, also where it pads them to the longest of the batch?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import Element, batch_of_one, is_list_of_elements
from lightning_dp.engines.agreement import inert
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.errors import PreflightError
from lightning_dp.look.leaks.transforms import DRAWS, with_seed
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.step.attributes import attributes_put_back

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
"""The part of a gradient by which it may change with its padding; 5e-2 in lower precision."""

ToBatch = Callable[[list[Any]], Any]
"""From records to a batch on the device, with the examples on the first axis."""


def check_collate_keeps_examples_apart(collate: ToBatch, records: list[Any], at_once: int) -> None:
    """Refuse a ``collate_fn`` in which one example's row depends on the records around it.

    Up to half of the records are collated in different company, everything random with the same seed, and their rows must be
    found in both batches, in whatever order. Batches that are padded to different lengths are left to
    :func:`check_padding_is_masked`.

    Args:
        collate: the loader's, and the way to the device.
        records: a few of the dataset; with fewer than 3 nothing can be said.
        at_once: so many are collated together at most, at least 2.

    Raises:
        PreflightError: an example's row depends on another example.
    """
    others = (len(records) - len(records) // 2) // 2
    kept = min(len(records) // 2, at_once - others)
    if others == 0:
        return
    companies = (records[: kept + others], records[:kept] + records[-others:])
    for seed in range(DRAWS):
        rows = [row_contents(with_seed(collate, company, seed)) for company in companies]
        if rows[0] is None or rows[1] is None or rows[0][1] != rows[1][1]:
            return
        if (rows[0][0] & rows[1][0]).total() < kept:
            raise PreflightError(
                "collate_fn mixes examples: the row of one example changed when other examples were collated with it: "
                "expected each row to depend on its own example only. Clipping could not bound what one record "
                "contributes. Remove MixUp, CutMix and batch statistics, or mix with public data only."
            )


def check_padding_is_masked(
    collate: ToBatch,
    records: list[Any],
    module: nn.Module,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    at_once: int,
) -> None:
    """Refuse a ``collate_fn`` that pads examples to fit each other, where the padding enters the gradient.

    The record that is padded most is collated by itself and in company, and its gradient must be the same. Otherwise
    removing the longest record of a batch would change every other record's gradient, and no clip norm bounds that.

    Args:
        collate: the loader's, and the way to the device.
        records: a few of the dataset.
        module: random layers are inert while gradients are compared, and attributes are put back.
        loss_function: training_step on a batch of one.
        parameters: the trainable parameters.
        at_once: so many records are collated together at most, at least 2.

    Raises:
        PreflightError: an example's gradient depends on how much it is padded.
    """
    try:
        shapes = [_shapes(with_seed(collate, [record], 0)) for record in records]
    except Exception:
        return  # it cannot do with one record, so nothing can be compared
    by_length = sorted(range(len(records)), key=lambda index: sum(map(torch.Size.numel, shapes[index])))
    shortest, longest = by_length[0], by_length[1:][1 - at_once :]
    company = [records[index] for index in (shortest, *longest)]
    together = with_seed(collate, company, 0)
    if shapes[shortest] == _shapes(together):
        return
    alone = with_seed(collate, company[:1], 0)
    if row_contents(alone) != row_contents(with_seed(collate, company[:1], 1)):
        return  # it draws random numbers, whose shape may change with the padding

    def gradient(one: Any, seed: int = 0) -> Tensor:
        seed_torch(seed)
        result = LoopEngine().clipped_sum(loss_function, parameters, one, 1, torch.inf)
        return torch.cat([g.flatten() for g in result.gradient.values()])

    with attributes_put_back(module), inert(module):
        try:
            own = gradient(alone)
        except Exception:
            return  # it is too short by itself, as for a convolution, so nothing can be compared
        if not torch.equal(own, gradient(alone, seed=1)):
            return  # likewise training_step
        difference = min(float((gradient(batch_of_one(together, row)) - own).norm()) for row in range(len(company)))
    size = float(own.norm())
    dtype = torch.float64 if all(p.dtype == torch.float64 for p in parameters.values()) else torch.float32
    low = any(p.dtype not in TOLERANCE for p in parameters.values()) or torch.is_autocast_enabled("cpu")
    if difference > (5e-2 if low else TOLERANCE[dtype]) * size:
        raise PreflightError(
            "collate_fn pads examples to the longest of the batch, and the padding enters the loss: the gradient of an "
            f"example changed by {difference / max(size, 1e-30):.1%} of its norm when it was padded: expected none. Removing "
            "one long record would change every other record's gradient, which clipping cannot bound. Mask the padding in "
            "the model and in the loss (attention_mask, ignore_index), or pad every record to the same length."
        )


def _shapes(batch: Any) -> list[torch.Size]:
    return [leaf.shape[1:] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]


def row_contents(batch: Any) -> tuple[Counter[bytes], list[torch.Size]] | None:
    """The rows of a batch, of all its tensors and lists of elements together, and their shapes; ``None`` without any."""
    leaves = pytree.tree_leaves(batch, is_leaf=is_list_of_elements)
    columns = [leaf for leaf in leaves if (isinstance(leaf, Tensor) and leaf.ndim) or is_list_of_elements(leaf)]
    if not columns:
        return None
    count = min(map(len, columns))
    rows = [b"".join(_content(column[index]) for column in columns) for index in range(count)]
    return Counter(rows), _shapes(batch)


def _content(row: Tensor | Element) -> bytes:
    if isinstance(row, Element):
        return b"".join(_content(leaf) for leaf in pytree.tree_leaves(row.content) if isinstance(leaf, Tensor))
    return bytes(row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
