"""Parameters that are brought together for one layer at a time, and again in its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


def shape_only(like: Tensor) -> Tensor:
    """A tensor of the shape and type of ``like`` that takes no memory, and whose numbers nobody can use unnoticed."""
    return torch.full((1,), torch.nan, dtype=like.dtype, device=like.device).expand(like.shape)


@contextmanager
def brought_again(values: Mapping[Tensor, Callable[[], Tensor]]) -> Iterator[None]:
    """While it lasts, autograd does not hold on to ``values`` for a backward pass, but has them brought again in it.

    Args:
        values: contiguous tensors → how each is brought, at any later time, with the same shape and numbers.
    """
    if not values:
        yield
        return
    bringing = {value.untyped_storage().data_ptr(): bring for value, bring in values.items()}

    def pack(tensor: Tensor) -> Any:
        bring = bringing.get(tensor.untyped_storage().data_ptr()) if tensor.numel() else None
        return tensor if bring is None else (bring, tensor.size(), tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        bring, size, stride, offset = packed
        again: Tensor = bring().as_strided(size, stride, offset)
        return again

    with _allowed(), saved_tensors_hooks(pack, unpack):
        yield


@contextmanager
def _allowed() -> Iterator[None]:
    """Without the ban on such hooks that vmap puts up, for they would see its wrapped tensors; below vmap there are none."""
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if forbidden is None:
        yield
        return
    torch._C._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_disable(forbidden)
