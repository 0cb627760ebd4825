"""A batch as vmap takes it: tensors to map over, and a way from one row of each to the example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import check_batch_axis, is_list_of_values
from lightning_dp.engines.decisions import part_ways


def mappable(batch: Any, examples: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]]:
    """The tensors of ``batch``, and a function from one row of each to the example as a batch of one.

    For ``torch.func.vmap``. Single leaves that are not tensors are shared by all examples. In place of a list of strings
    or numbers, one per example, the function sees something that may be passed on but not looked at: whoever looks makes
    the examples part ways (see :mod:`lightning_dp.engines.decisions`). A single example has its list of one.

    The example is a copy, so that a training step that changes its batch in place finds it unchanged if it is run again.

    Raises:
        BatchAxisError: see :func:`~lightning_dp.batches.microbatch.check_batch_axis`.
        ValueError: there is no tensor to map over.
    """
    check_batch_axis(batch, examples)
    leaves, structure = pytree.tree_flatten_with_path(batch, is_leaf=is_list_of_values)

    if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
        raise ValueError("it takes lists with one element for each example, which may differ in shape")

    def example(rows: list[Tensor]) -> Any:
        remaining = iter(rows)

        def one(path: Any, leaf: Any) -> Any:
            if isinstance(leaf, Tensor):
                return next(remaining).unsqueeze(0).clone()
            if examples > 1 and is_list_of_values(leaf):
                return _Unread(type(leaf), examples, f"batch{pytree.keystr(path)}")
            return leaf

        return pytree.tree_unflatten([one(path, leaf) for path, leaf in leaves], structure)

    return [leaf for _, leaf in leaves if isinstance(leaf, Tensor)], example


class _Unread:
    """Stands for a list of one value while all examples run at once, each of which has another value."""

    def __init__(self, kind: type, examples: int, name: str) -> None:
        self.__dict__["_unread"] = kind, examples, name

    @property  # type: ignore[misc]  # so that isinstance answers as it would for one example
    def __class__(self) -> type:
        kind: type = self.__dict__["_unread"][0]
        return kind

    def __getattr__(self, name: str) -> NoReturn:
        self._look()

    def _look(self, *_: Any) -> NoReturn:
        _, examples, name = self.__dict__["_unread"]
        part_ways([[index] for index in range(examples)], f"reads {name}, which is not a tensor", single=True)

    __len__ = __iter__ = __getitem__ = __contains__ = __bool__ = __str__ = __repr__ = __format__ = _look
    __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = __hash__ = __add__ = __radd__ = __mul__ = __rmul__ = _look
    __reversed__ = __setitem__ = __delitem__ = __iadd__ = __imul__ = __reduce_ex__ = __reduce__ = _look
