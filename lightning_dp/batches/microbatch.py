"""A step's sample in pieces that fit into memory, and a batch in pieces of one example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.seeded import Seeded, content_of
from lightning_dp.batches.simple import is_simple, mapped


@dataclass(frozen=True)
class Element:
    """One example's element of a list that has one for each example: an image of its own size, a dict of boxes and labels.

    Nothing looks into it, so a list of these is a list of values, see :func:`check_batch_axis`.
    """

    content: Any


@dataclass(frozen=True)
class Shared:
    """Something that all examples share, because the user says so: an object, a list, a text. Nothing looks into it."""

    content: Any


@dataclass(frozen=True)
class Apart:
    """A batch whose examples were collated one by one: each element holds what training_step takes for one example."""

    elements: list[Element]


pytree.register_pytree_node(
    Apart,
    lambda apart: ([apart.elements], None),
    lambda parts, _: Apart(*parts),
    flatten_with_keys_fn=lambda apart: ([(pytree.GetAttrKey("elements"), apart.elements)], None),
)


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
    """Raise :class:`BatchAxisError` unless it is clear which part of ``batch`` belongs to which example.

    Per-example clipping is only as good as that knowledge: an example that sees a part of another's data changes its
    gradient too, and no clip norm bounds that. So what is unclear is refused rather than guessed at. Clear are

    - tensors with ``examples`` rows,
    - lists and tuples of ``examples`` strings, numbers or objects (what PyTorch's default collate makes of strings), and of
      :class:`Element`,
    - ``None`` and single strings and numbers, which all examples share and which must not depend on the data, and
      :class:`Shared`,

    in any nest of dicts, lists, tuples and named tuples, and of what :mod:`lightning_dp.batches.containers` takes apart.

    Example:
        >>> import torch
        >>> check_batch_axis({"image": torch.zeros(4, 3), "name": ["a", "b", "c", "d"]}, 4)
    """
    batch = content_of(batch)
    for where, leaf in unclear_parts(batch, examples):
        if leaf is batch and holds_no_tensor(batch) and not _is_value(batch):
            break  # texts, say
        if isinstance(leaf, Tensor):
            if leaf.ndim == 0:
                raise BatchAxisError(
                    f"{where} has shape (): expected {examples} rows, one for each of the {examples} examples drawn. It is a "
                    "single number. If it is the same whatever the examples are, such as a temperature, say so with "
                    f"DifferentialPrivacy({_as_shared(batch, leaf)}) or keep it on the module; what collate_fn computes over "
                    "the batch, such as a mean or the longest length, each example has to do without."
                )
            raise BatchAxisError(
                f"{where} has shape {tuple(leaf.shape)}: expected {examples} rows, one for each of the {examples} "
                "examples drawn. Let collate_fn put the examples on the first axis, one row each, or say "
                "where they are with DifferentialPrivacy(batch_axis=...): 1 for the second axis, 'list' for a list with one "
                "element for each example, 'each' to have collate_fn called for every example alone."
            )
        if is_list_of_values(leaf):
            raise BatchAxisError(
                f"{where} is a {type(leaf).__name__} of {len(leaf)} strings or numbers: expected {examples}, one for "
                f"each of the {examples} examples drawn. Let collate_fn return one each, or a tensor with one row "
                "each; keep constants on the module, or name them in DifferentialPrivacy(batch_axis={'name': None})."
            )
        raise BatchAxisError(
            f"{where} is of type {type(leaf).__name__}: expected tensors with {examples} rows in dicts, lists and "
            "tuples. Nobody can tell which example a part of it belongs to; let collate_fn turn it into tensors, or "
            "leave it out. With DifferentialPrivacy(batch_axis='each') collate_fn is called for every example alone."
        )
    if holds_no_tensor(batch):
        raise BatchAxisError(
            f"batch={type(batch).__name__} holds no tensor: expected at least one tensor with {examples} rows. "
            "Let the dataset or collate_fn return tensors, or give DifferentialPrivacy(batch_axis='each')."
        )


def unclear_parts(batch: Any, examples: int) -> list[tuple[str, Any]]:
    """The parts of ``batch``, by their places, of which :func:`check_batch_axis` does not know whose they are."""
    batch = content_of(batch)
    leaves = pytree.tree_leaves_with_path(batch, is_leaf=is_list_of_values)

    def is_clear(leaf: Any) -> bool:
        if isinstance(leaf, Tensor):
            return leaf.ndim > 0 and leaf.shape[0] == examples
        if is_list_of_values(leaf):
            return len(leaf) == examples
        return leaf is None or isinstance(leaf, (*_VALUES, Shared))

    unclear = [(f"batch{pytree.keystr(path)}", leaf) for path, leaf in leaves if not is_clear(leaf)]
    return unclear or ([("batch", batch)] if holds_no_tensor(batch) else [])


def holds_no_tensor(batch: Any) -> bool:
    """Whether there is neither a tensor nor a list of :class:`Element` in ``batch``."""
    leaves = pytree.tree_leaves(batch, is_leaf=is_list_of_values)
    return not any(isinstance(leaf, Tensor) or is_list_of_elements(leaf) for leaf in leaves)


def batch_of_one(batch: Any, index: int) -> Any:
    """The ``index``-th example of ``batch`` as a batch of one: tensors keep their first axis, with length 1.

    A list of strings or numbers becomes a list of one; ``None`` and single strings and numbers are shared by all
    examples. See :func:`check_batch_axis` for what a batch may hold. Tensors are copies, so that a training_step that
    writes into its batch writes into nobody else's, and finds the example unchanged if it is run again.
    """
    if isinstance(batch, Seeded):
        return Seeded(batch_of_one(batch.content, index), batch.seeds[index : index + 1], batch.common)
    if is_simple(batch):
        return mapped(lambda part: part[index : index + 1].clone(), batch)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[index : index + 1].clone()
        return leaf[index : index + 1] if is_list_of_values(leaf) else leaf

    return pytree.tree_map(one, batch, is_leaf=is_list_of_values)


def rows(batch: Any, first: int, count: int) -> Any:
    """``count`` examples of ``batch``, from the ``first`` on, as a batch of their own. See :func:`batch_of_one`."""
    return batch_of_one(batch, first) if count == 1 else take(batch, list(range(first, first + count)))


def padded(batch: Any, examples: int, to: int) -> Any:
    """``batch`` with copies of its first example at the end, ``to`` examples in all.

    So that all micro-batches of a run have one shape. The copies must not count: give the engine ``counted=examples``.

    Args:
        batch: ``examples`` examples.
        examples: at least 1.
        to: at least ``examples``.

    Raises:
        BatchAxisError: see :func:`check_batch_axis`.

    Example:
        >>> import torch
        >>> padded([torch.tensor([3, 5]), ["a", "b"]], 2, 4)
        [tensor([3, 5, 3, 3]), ['a', 'b', 'a', 'a']]
    """
    check_batch_axis(batch, examples)
    missing = to - examples

    def pad(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return torch.cat([leaf, leaf[:1].expand(missing, *leaf.shape[1:])])
        return type(leaf)([*leaf, *[leaf[0]] * missing]) if is_list_of_values(leaf) else leaf

    return pytree.tree_map(pad, batch, is_leaf=is_list_of_values) if missing else batch


def take(batch: Any, indices: list[int]) -> Any:
    """The examples of ``batch`` at ``indices``, as a batch. See :func:`batch_of_one`."""
    if isinstance(batch, Seeded):
        return Seeded(take(batch.content, indices), batch.seeds[indices], batch.common)
    if is_simple(batch):
        return mapped(lambda part: part[indices], batch)

    def some(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf[indices]
        return type(leaf)(leaf[index] for index in indices) if is_list_of_values(leaf) else leaf

    return pytree.tree_map(some, batch, is_leaf=is_list_of_values)


_VALUES = (str, bytes, int, float)


def _as_shared(batch: Any, part: Any) -> str:
    """What to give so that a part of a batch is taken for one that all examples share."""
    for path, leaf in pytree.tree_leaves_with_path(batch):
        if leaf is part and path:
            kinds = ("key", "idx", "name")
            field = ".".join(str(next(getattr(key, kind) for kind in kinds if hasattr(key, kind))) for key in path)
            return f"batch_axis={{{field!r}: None}}"
    return "batch_axis"


def is_list_of_values(node: Any) -> bool:
    """Whether ``node`` is a list or tuple of strings, numbers or objects that hold no tensor, one for each example."""
    return type(node) in (list, tuple) and len(node) > 0 and all(map(_is_value, node))


def is_list_of_elements(node: Any) -> bool:
    """Whether ``node`` is a list or tuple of :class:`Element`, one for each example."""
    return is_list_of_values(node) and isinstance(node[0], Element)


def _is_value(item: Any) -> bool:
    if isinstance(item, _VALUES):
        return True
    return item is not None and not isinstance(item, (Tensor, Shared)) and pytree.tree_is_leaf(item)
