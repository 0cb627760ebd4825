"""Whether two reads of an example came to the same, as far as anybody can tell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.containers import open_containers
from lightning_dp.mechanism.same import same

FEW = 64
"""Containers of more elements are not compared."""

_PLAIN = (int, float, complex, str, bytes, np.generic, Tensor, np.ndarray)


def alike(one: Any, other: Any) -> bool:
    """Whether two records have the same numbers, texts, tensors, arrays and images; objects of other kinds count as the same.

    Example:
        >>> alike((object(), 1.0), (object(), 1.0)), alike([1.0], [2.0])
        (True, False)
    """
    first, second = (pytree.tree_leaves_with_path(open_containers(each)) for each in (one, other))
    if [path for path, _ in first] != [path for path, _ in second]:
        return False
    return all(_same(leaf, found) for (_, leaf), (_, found) in zip(first, second, strict=True))


def can_be_compared(value: Any) -> bool:
    """Whether :func:`alike` can tell two such values apart."""
    if isinstance(value, (Mapping, list, tuple, set)):
        return len(value) <= FEW
    return isinstance(value, _PLAIN) or hasattr(value, "__array_interface__")


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, (*_PLAIN, set, frozenset)):
        return same(one, other)
    if hasattr(one, "__array_interface__"):  # an image of PIL
        return same(np.asarray(one), np.asarray(other))
    return True
