"""Parameters that somebody else keeps, in shards for instance, and brings together for one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Keeper(Protocol):
    """Keeps parameters, trainable and frozen, that the engine is not given, and takes what the engine finds for them."""

    @property
    def names(self) -> Collection[str]:
        """Of the parameters. Each is the ``weight`` or ``bias`` of layers with a rule, and used nowhere else."""
        ...

    def one_pass(self) -> AbstractContextManager[None]:
        """Around one forward pass, backward pass and sum."""
        ...

    def bring(self, name: str) -> Tensor:
        """The parameter's values. The keeper does not hold them: they are gone when the caller lets go."""
        ...

    def add(self, name: str, total: Tensor | None) -> None:
        """Take the pass's sum of clipped gradients of a trainable parameter, ``None`` for zero, in a fixed order."""
        ...


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
    """Without the ban on such hooks that vmap puts up, for they would see its wrapped tensors; here, below vmap, there are none."""
    forbidden = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    if forbidden is None:
        yield
        return
    torch._C._autograd._saved_tensors_hooks_enable()
    try:
        yield
    finally:
        torch._C._autograd._saved_tensors_hooks_disable(forbidden)
