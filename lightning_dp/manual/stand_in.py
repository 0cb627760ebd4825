"""A batch that holds nobody's data, in the shape of one that does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def without_content(batch: Any) -> Any:
    """``batch`` with its content gone: zeros for numbers, ``True`` for truth values, ``""`` for texts.

    Nothing but structure, shapes, types and device are left of the examples. (Truth values are nearly always masks, and a
    mask that hides everything makes attention divide by zero.)

    Args:
        batch: any nest of tensors, numbers and texts.

    Raises:
        TypeError: a leaf is of another type, whose content nobody could remove.

    Example:
        >>> without_content({"x": torch.ones(1, 2), "name": ["Ada"], "mask": torch.tensor([False])})
        {'x': tensor([[0., 0.]]), 'name': [''], 'mask': tensor([True])}
    """
    return pytree.tree_map(_emptied, batch)


def _emptied(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return torch.ones_like(leaf) if leaf.dtype == torch.bool else torch.zeros_like(leaf)
    if leaf is None:
        return None
    if type(leaf) in (str, bytes, int, float, bool):
        return type(leaf)()
    raise TypeError(
        f"a batch holds a {type(leaf).__name__}: expected tensors, numbers and texts in dicts, lists and tuples. Its content "
        "could not be kept from a step that must not see it; let collate_fn turn it into tensors."
    )
