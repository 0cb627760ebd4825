"""Batches that are nothing but a dict, list or tuple of tensors, as most are: handled without PyTorch's tree functions.

These are written in Python and take tens of microseconds, which counts where examples are handed over one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

_TENSORS = {Tensor}


def is_simple(batch: Any) -> bool:
    """Whether a batch is a dict, list or tuple (of no class of its own) that holds tensors and nothing else.

    Example:
        >>> import torch
        >>> is_simple({"x": torch.zeros(2)}), is_simple([torch.zeros(2), 1]), is_simple([])
        (True, False, False)
    """
    kind = type(batch)
    if kind is dict:
        batch = batch.values()
    elif kind is not tuple and kind is not list:
        return False
    return set(map(type, batch)) == _TENSORS


def mapped(function: Callable[[Tensor], Any], batch: Any) -> Any:
    """A simple batch of what ``function`` makes of each of its tensors."""
    if type(batch) is dict:
        return {name: function(part) for name, part in batch.items()}
    return type(batch)([function(part) for part in batch])


def flattened(batch: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """As ``pytree.tree_flatten``."""
    if not is_simple(batch):
        return pytree.tree_flatten(batch, is_leaf=is_leaf)
    if type(batch) is dict:
        return list(batch.values()), _of_a_dict(tuple(batch))
    kind: Any = type(batch)
    return list(batch), _of_a_list(kind, len(batch))


@lru_cache(maxsize=256)
def _of_a_dict(names: tuple[Any, ...]) -> Any:
    return pytree.tree_structure(dict.fromkeys(names, 0))


@lru_cache(maxsize=256)
def _of_a_list(kind: Any, length: int) -> Any:
    return pytree.tree_structure(kind([0] * length))
