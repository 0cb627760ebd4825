"""Short stand-ins for long tensors, and for whole checkpoints, by which two runs are compared."""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WIDTH = 256
"""Numbers in a sketch: the length of a difference is then measured to within about a tenth."""


def sketch(tensor: Tensor) -> Tensor:
    """At most :data:`WIDTH` numbers, float64, linear in the tensor, and of about its length (the very values if it is short).

    A count sketch: every value goes to the place of its number modulo the width, with a random sign.

    Example:
        >>> sketch(torch.tensor([1.0, -2.0]))
        tensor([ 1., -2.], dtype=torch.float64)

    Source: Charikar, Chen and Farach-Colton (2002), "Finding frequent items in data streams".
    """
    flat = tensor.detach()
    flat = torch.view_as_real(flat.resolve_conj()) if flat.is_complex() else flat
    flat = flat.reshape(-1).to("cpu", torch.float64)
    if len(flat) <= WIDTH:
        return flat.clone()
    padded = torch.zeros(-(-len(flat) // WIDTH) * WIDTH, dtype=torch.float64)
    padded[: len(flat)] = flat * _signs(len(flat))
    return padded.view(-1, WIDTH).sum(0)


@lru_cache(maxsize=64)
def _signs(length: int) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(2, (length,), generator=generator, dtype=torch.int8) * 2 - 1


@dataclass(frozen=True)
class Leaf:
    """A part of a nest: its sketch if it holds numbers, and what it is besides.

    Attributes:
        form: its type and shape, or its content if it is no number.
        values: a sketch of its numbers, ``None`` if it holds none.
    """

    form: str
    values: Tensor | None

    def differs(self, other: Leaf, tolerance: float) -> float:
        """By how much, in parts of the length of the longer one; 0 within ``tolerance``, ∞ if they cannot be compared."""
        if self.form != other.form:
            return math.inf
        if self.values is None or other.values is None:
            return 0.0
        first, second = (
            values.nan_to_num(nan=1.7e3, posinf=1.3e3, neginf=-1.3e3) for values in (self.values, other.values)
        )
        size = max(float(first.norm()), float(second.norm()))
        off = float((first - second).norm())
        return off / size if off > tolerance * size else 0.0


def leaves(nest: Any, path: str = "") -> dict[str, Leaf]:
    """The parts of a nest of dicts, lists, tensors and values, by their paths."""
    return dict(_leaves(nest, path))


def _leaves(nest: Any, path: str) -> Iterator[tuple[str, Leaf]]:
    if isinstance(nest, Mapping):
        yield f"{path} (keys)", Leaf(f"{len(nest)} entries", None)
        for key, value in nest.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(nest, (list, tuple)):
        yield f"{path} (length)", Leaf(str(len(nest)), None)
        for place, value in enumerate(nest):
            yield from _leaves(value, f"{path}[{place}]")
    else:
        yield path, leaf(nest)


def leaf(value: Any) -> Leaf:
    """One part."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, Tensor) and not value.is_meta:
        dense = value.to_dense() if value.layout != torch.strided else value
        return Leaf(f"{value.dtype}{tuple(value.shape)}", sketch(dense))
    if isinstance(value, (bool, int)) or value is None:
        return Leaf(repr(value), None)
    if isinstance(value, float):
        return Leaf("float", torch.tensor([value], dtype=torch.float64))
    try:
        return Leaf(str(hash(pickle.dumps(value))), None)
    except Exception:
        return Leaf(type(value).__qualname__, None)


def row(batch: Any) -> list[Leaf]:
    """One example as training_step gets it."""
    return [leaf(part) for part in pytree.tree_leaves(batch)]
