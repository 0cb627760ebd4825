"""A tensor that is computed when something first asks for its value."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Late(Tensor):
    """Stands for a tensor that may never be needed; any torch function that is given it gets the tensor itself.

    Nothing else tells it from that tensor: values, shape and gradient are the tensor's, under transforms of ``torch.func``
    too. What counts is when the value is asked for: what it is computed from must not have been changed in place by then.
    Only ``torch.autograd.Function.apply`` does not ask, and sees a constant.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> late = Late.of(lambda: (3 * weight).sum())
        >>> late.computed is None, float((late + 1).detach()), late.requires_grad
        (True, 7.0, True)
    """

    _compute: Callable[[], Tensor]
    computed: Tensor | None

    @staticmethod
    def of(compute: Callable[[], Tensor]) -> Late:
        """A placeholder for what ``compute`` returns, which is called at most once."""
        late: Late = Tensor._make_wrapper_subclass(Late, ())
        late._compute, late.computed = compute, None
        return late

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = at_hand((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # declared static, and documented as a class method
        cls, func: Callable[..., Any], types: Iterable[Any], args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = at_hand((args, kwargs or {}))
        return func(*args, **kwargs)


def at_hand(nest: Any) -> Any:
    """``nest`` with every late tensor computed."""
    return pytree.tree_map(_value, nest)


def _value(leaf: Any) -> Any:
    if type(leaf) is not Late:
        return leaf
    if leaf.computed is None:
        leaf.computed = torch.as_tensor(leaf._compute())
    return leaf.computed
