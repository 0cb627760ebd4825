"""A micro-batch and what each of its examples draws random numbers from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Seeded:
    """A micro-batch whose examples draw independently of each other, of their places and of their number.

    Attributes:
        content: B examples, as engines take them.
        seeds: 64 bits for each of them, ``(B,)`` int64 on the CPU.
        common: 32 bits, the same for all examples of a step on all ranks. They distinguish the draws of one example.
    """

    content: Any
    seeds: Tensor
    common: int

    def with_other_draws(self) -> Seeded:
        """The same examples, which draw other numbers."""
        return replace(self, seeds=~self.seeds, common=self.common ^ 1)


def _put_together(parts: Iterable[Any], common: int) -> Seeded:
    content, seeds = parts
    return Seeded(content, seeds, common)


pytree.register_pytree_node(
    Seeded,
    lambda seeded: ([seeded.content, seeded.seeds], seeded.common),
    _put_together,
    flatten_with_keys_fn=lambda seeded: (
        [(pytree.GetAttrKey("content"), seeded.content), (pytree.GetAttrKey("seeds"), seeded.seeds)],
        seeded.common,
    ),
)


def content_of(batch: Any) -> Any:
    """A micro-batch without its seeds, if it has any."""
    return batch.content if isinstance(batch, Seeded) else batch


def seeded(batch: Any, seeds: Any, common: int) -> Seeded:
    """``batch`` with seeds that are given as unsigned numbers, ``(B,)`` uint64."""
    return Seeded(batch, torch.from_numpy(seeds.view("int64").copy()), common)
