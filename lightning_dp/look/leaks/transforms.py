"""Does what happens between dataset and training_step keep each example's row its own?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import Element, is_list_of_elements
from lightning_dp.errors import PreflightError
from lightning_dp.mechanism.seeded_globals import seed_torch

DRAWS = 12
"""Random transforms are tried with this many seeds; one that pairs two examples at random escapes once in 2¹²."""


def check_rows_stay_apart(transform: Callable[[Any], Any], batch: Any, examples: int, name: str) -> None:
    """Refuse a batch transform in which one example's row depends on another example.

    The second half of ``batch`` is replaced by other content, everything random is repeated with the same seed, and the
    rows of the first half must come out the same. MixUp, CutMix and normalisation by batch statistics do not pass:
    after them, removing one record would change several clipped gradients, and the sensitivity would exceed C.

    Args:
        transform: from a batch to a batch, as applied before training_step.
        batch: ``examples`` rows; private, and only compared with itself here.
        examples: how many rows, at least 2 (fewer cannot be checked and pass).
        name: what to call the transform in the error.

    Raises:
        PreflightError: a row changed with another example.
    """
    kept = examples // 2
    if kept == 0:
        return
    other = pytree.tree_map(lambda leaf: _with_other_rows(leaf, kept), batch, is_leaf=is_list_of_elements)
    for seed in range(DRAWS):
        first, second = (with_seed(transform, each, seed) for each in (batch, other))
        before, after = (_kept_apart(each, kept) for each in (first, second))
        for path, leaf in pytree.tree_leaves_with_path(before):
            twin = dict(pytree.tree_leaves_with_path(after)).get(path)
            if not isinstance(leaf, Tensor) or not isinstance(twin, Tensor) or leaf.ndim == 0:
                continue
            if leaf.shape != twin.shape or not torch.equal(leaf.nan_to_num(), twin.nan_to_num()):
                raise PreflightError(
                    f"{name} mixes examples: batch{pytree.keystr(path)} of one example changed when another example was "
                    "replaced: expected each row to depend on its own example only. Clipping could not bound what one "
                    "record contributes. Remove MixUp, CutMix and batch statistics, or mix with public data only."
                )


def _with_other_rows(leaf: Any, kept: int) -> Any:
    if is_list_of_elements(leaf):
        other = pytree.tree_map(lambda part: part * 0.5 + 1.0 if _is_float(part) else part, leaf[0].content)
        return type(leaf)([*leaf[:kept], *[Element(other)] * (len(leaf) - kept)])
    return _replace_rows(leaf, kept) if isinstance(leaf, Tensor) and leaf.ndim > 0 else leaf


def _is_float(part: Any) -> bool:
    return isinstance(part, Tensor) and part.is_floating_point()


def _kept_apart(batch: Any, kept: int) -> Any:
    """The rows of the examples that were kept."""

    def rows(leaf: Any) -> Any:
        if is_list_of_elements(leaf):
            return [element.content for element in leaf[:kept]]
        return leaf[:kept] if isinstance(leaf, Tensor) and leaf.ndim else leaf

    return pytree.tree_map(rows, batch, is_leaf=is_list_of_elements)


def _replace_rows(leaf: Tensor, kept: int) -> Tensor:
    """The same rows up to ``kept``; after them, copies of other rows, shifted where they are floating point."""
    leaf = leaf.clone()
    rest = leaf[kept:]
    leaf[kept:] = rest.flip(0) * 0.5 + 1.0 if leaf.is_floating_point() else leaf[:1].expand_as(rest)
    return leaf


def with_seed(transform: Callable[[Any], Any], batch: Any, seed: int) -> Any:
    """``transform`` of a copy of ``batch``, with torch's generators seeded for it alone."""
    with isolate_rng():
        seed_torch(seed)
        return transform(pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, batch))
