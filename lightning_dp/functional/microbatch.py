"""A step's sample in pieces that fit into memory, and a batch in pieces of one example."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class BatchAxisError(ValueError):
    """A batch whose tensors do not have one row per drawn example."""


def split(indices: npt.NDArray[np.int64], physical_batch_size: int) -> list[npt.NDArray[np.int64]]:
    """Split a draw into the fewest pieces of at most ``physical_batch_size``, as equal as possible.

    An empty draw gives no piece.

    Example:
        >>> [len(piece) for piece in split(np.arange(10), 4)]
        [4, 3, 3]
    """
    if len(indices) == 0:
        return []
    return np.array_split(indices, -(-len(indices) // physical_batch_size))


def check_batch_axis(batch: Any, examples: int) -> None:
    """Raise :class:`BatchAxisError` unless every tensor in ``batch`` has ``examples`` rows.

    Per-example clipping is only as good as the knowledge of which row belongs to whom, so a batch in which that is
    unclear is refused rather than guessed at.
    """
    tensors = [(path, leaf) for path, leaf in pytree.tree_leaves_with_path(batch) if isinstance(leaf, Tensor)]
    if not tensors:
        raise BatchAxisError(
            f"batch={type(batch).__name__} holds no tensor: expected at least one tensor with {examples} rows. "
            "Let the dataset or collate_fn return tensors."
        )
    for path, leaf in tensors:
        if leaf.ndim == 0 or leaf.shape[0] != examples:
            raise BatchAxisError(
                f"batch{pytree.keystr(path)} has shape {tuple(leaf.shape)}: expected {examples} rows, one for each of "
                f"the {examples} examples drawn. Let collate_fn put the examples on the first axis, one row each."
            )


def batch_of_one(batch: Any, index: int, examples: int) -> Any:
    """The ``index``-th example of ``batch`` as a batch of one: tensors keep their first axis, with length 1.

    A list of ``examples`` strings or numbers (what PyTorch's default collate makes of non-tensor fields) becomes a
    list of one; other leaves are shared by all examples.
    """
    if isinstance(batch, (list, tuple)) and type(batch) in (list, tuple):
        if len(batch) == examples and all(isinstance(item, (str, bytes, int, float)) for item in batch):
            return type(batch)(batch[index : index + 1])
        return type(batch)(batch_of_one(item, index, examples) for item in batch)
    if type(batch) is dict:
        return {name: batch_of_one(item, index, examples) for name, item in batch.items()}
    return pytree.tree_map(lambda leaf: leaf[index : index + 1] if isinstance(leaf, Tensor) else leaf, batch)

