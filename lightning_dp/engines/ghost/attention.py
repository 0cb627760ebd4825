"""``scaled_dot_product_attention`` for all examples at once; torch has no batched kernel of it for the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_dp.engines.ghost.below import below_vmap, examples_first
from lightning_dp.engines.ghost.call import Pass
from lightning_dp.engines.ghost.losses import FOLDED


class _Attention(torch.autograd.Function):
    """A function whose only content is its vmap rule: one call with the examples as one more leading axis."""

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise AssertionError("called outside vmap")

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        raise AssertionError("called outside vmap")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *operands: Any) -> tuple[Tensor, int]:
        tensors = (t for t in operands[:4] if t is not None)
        rows = (examples_first(t, axis, info.batch_size) for t, axis in zip(tensors, in_dims, strict=False))
        return _of_all(operands[4], *rows), 0


def _of_all(options: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of all examples, each tensor with the examples on its first axis."""
    leading = query.shape[:-2]
    if mask is not None:  # align it with the query from the right, as broadcasting within an example would
        mask = mask[(slice(None), *(None,) * (query.ndim - mask.ndim))]
        mask = _four_axes(mask.expand(*leading, *mask.shape[-2:]))
    query, key, value = _four_axes(query), _four_axes(key), _four_axes(value)
    output = F.scaled_dot_product_attention(query, key, value, mask, **options)
    return output.reshape(*leading, *output.shape[-2:])


def _four_axes(t: Tensor) -> Tensor:
    """Examples and their own leading axes in one, as the kernels want it: ``(B, heads, T, D)``."""
    return t.flatten(0, t.ndim - 4) if t.ndim > 4 else t


class _Folding(TorchFunctionMode):
    def __init__(self, of: Pass) -> None:
        super().__init__()
        self._pass = of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self._attention(func, *args, **(kwargs or {}))
        folded = FOLDED.get(func)
        if folded is not None:
            assert self._pass.witness is not None
            found = folded(self._pass.witness, *args, **(kwargs or {}))
            if found is not None:
                return found
        return func(*args, **kwargs) if kwargs else func(*args)

    def _attention(
        self,
        plain: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        options = {**dict(zip(("dropout_p", "is_causal"), args, strict=False)), **kwargs}
        if not same or not torch._C._functorch.is_batchedtensor(query):
            return plain(query, key, value, attn_mask, **options)
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        assert self._pass.witness is not None
        output = below_vmap(partial(_of_all, options), tensors, self._pass.witness)
        return _Attention.apply(query, key, value, attn_mask, options) if output is None else output


def folded_attention(of: Pass) -> AbstractContextManager[Any]:
    """While it lasts, attention under vmap is one call of the plain kernel.

    Args:
        of: the pass it belongs to.
    """
    return _Folding(of)
