"""Decisions that a training step takes in Python on an example's values, while all examples run at once under vmap.

``if mask.all():`` has one answer for each example, and Python goes one way. So the values of all examples are looked at:
if the answers agree, that is what each example alone would have answered, and the run goes on with it. If they differ,
the examples part ways: the run is given up and started again for each group of examples with the same answer. Either way
every example's gradient is that of a batch of one, whatever the other examples are; only the time depends on them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from lightning_dp.engines.draws import can_be_drawn_into, drawn_for_all, empty_for_all
from lightning_dp.engines.late import Late, at_hand
from lightning_dp.engines.recurrent import CELLS, can_be_unrolled, unrolled
from lightning_dp.engines.swaps import SWAPS
from lightning_dp.engines.user_code import Line, line_of_the_caller


class PartingError(BaseException):
    """The examples of a micro-batch answer differently.

    Not an ``Exception``, so that no ``except Exception`` of the user's takes it for an error of the training step.

    Attributes:
        groups: the positions of the examples, by answer.
        what: what the training step does.
        line: where.
        single: whether hardly two examples can be expected to agree.
    """

    def __init__(self, groups: list[list[int]], what: str, line: Line | None, single: bool) -> None:
        super().__init__(what)
        self.groups, self.what, self.line, self.single = groups, what, line, single


class _Answering(TorchFunctionMode):
    """Answers what Python asks of tensors that vmap maps over."""

    def __init__(self, witness: Tensor) -> None:
        super().__init__()
        self._witness = witness
        while not _functorch.is_batchedtensor(witness):
            witness = _functorch.get_unwrapped(witness)  # a level of grad above vmap's
        self._level = _functorch.maybe_get_level(witness)
        self.parting: PartingError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _LOOKED_AT and Late not in types and not (kwargs and "generator" in kwargs):
            return func(*args, **kwargs) if kwargs else func(*args)  # nearly always
        kwargs = kwargs or {}
        if Late in types:
            args, kwargs = at_hand((args, kwargs))
        if "generator" in kwargs or func in _WITH_GENERATOR:
            self._check_generator((*args, kwargs.get("generator")))
        if func in _VALUES:
            return self._value(func, args, kwargs)
        if can_be_unrolled(func, args, kwargs):
            return unrolled(func, *args)
        if func in _ASSIGNMENTS and len(args) > 1 and _is_wrapped(args[1]) and not _is_wrapped(args[0]):
            raise RuntimeError(
                "it assigns what depends on the example, or on a weight, to the memory of a tensor that all examples share"
            )
        if func in _WITH_SPARSE_GRADIENTS:
            kwargs = {**kwargs, "sparse": False} if len(args) <= _WITH_SPARSE_GRADIENTS[func] else kwargs
            args = tuple(False if place == _WITH_SPARSE_GRADIENTS[func] else one for place, one in enumerate(args))
        if func is torch.empty and can_be_drawn_into(kwargs):
            return empty_for_all(self._witness, *args, **kwargs)
        settled = _SHAPES.get(func)
        if settled is not None:
            args, kwargs = settled(self._settled, *args, **kwargs)
        return func(*args, **kwargs)

    def _check_generator(self, given: tuple[Any, ...]) -> None:
        """Of a generator of the user's own, the numbers of several examples would come in the order of their places."""
        if any(isinstance(one, torch.Generator) and one is not torch.default_generator for one in given):
            rows = self._rows(self._witness)
            groups = [[place] for place in range(1 if rows is None else len(rows))]
            if len(groups) > 1:
                part_ways(groups, "draws from a torch.Generator", single=True)

    def _value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The Python value that ``func`` gives for every example, if it is one."""
        leaves, structure = pytree.tree_flatten((args, kwargs))
        rows = [self._rows(leaf) for leaf in leaves]
        if all(row is None for row in rows):
            return func(*args, **kwargs)
        with temporarily_clear_interpreter_stack():
            answers = self._answers(func, leaves, rows, structure)
        groups = _groups([repr(answer) for answer in answers])
        if len(groups) > 1:
            part_ways(groups, "takes a value of an example into Python", single=isinstance(answers[0], float))
        return answers[0]

    def _answers(
        self, func: Any, leaves: list[Any], rows: list[Tensor | None], structure: pytree.TreeSpec
    ) -> list[Any]:
        columns = [None if row is None else row.cpu().unbind() for row in rows]
        examples = next(len(column) for column in columns if column is not None)
        answers = []
        for index in range(examples):
            each = [
                leaf if column is None else column[index].to(leaf.device)
                for leaf, column in zip(leaves, columns, strict=True)
            ]
            given, named = pytree.tree_unflatten(each, structure)
            answers.append(func(*given, **named))
        return answers

    def _settled(self, selector: Tensor) -> Tensor:
        """``selector``, which decides on a shape, as a tensor that is the same for all examples."""
        rows = self._rows(selector)
        if rows is None:
            return selector
        with temporarily_clear_interpreter_stack():
            groups = [] if bool((rows == rows[:1]).all()) else _groups([repr(row.tolist()) for row in rows.cpu()])
        if len(groups) > 1:
            part_ways(groups, "lets an example's values decide on a shape", single=False)
        return rows[0]

    def _rows(self, leaf: Any) -> Tensor | None:
        """The values of all examples, ``(B, ...)``; ``None`` if they do not depend on the example."""
        while isinstance(leaf, Tensor) and _functorch.is_functorch_wrapped_tensor(leaf):
            inner = _functorch.get_unwrapped(leaf)
            if _functorch.is_batchedtensor(leaf):
                if _functorch.maybe_get_level(leaf) != self._level:
                    return None  # under a vmap of the user's own, where torch refuses a batch of one as well
                with temporarily_clear_interpreter_stack():
                    return inner.detach().movedim(_functorch.maybe_get_bdim(leaf), 0)
            leaf = inner
        return None


_answering: ContextVar[_Answering | None] = ContextVar("_answering", default=None)


@contextmanager
def answered_for_all(witness: Tensor) -> Iterator[None]:
    """While it lasts, Python may ask for values of tensors under vmap.

    Args:
        witness: a tensor that the engine's own vmap maps over.

    Raises:
        PartingError: the examples answer differently, also if the training step caught the exception.
    """
    answering = _Answering(witness)
    token = _answering.set(answering)
    try:
        with answering, drawn_for_all(), SWAPS.open():
            yield
    finally:
        _answering.reset(token)
        if answering.parting is not None:
            raise answering.parting


def _is_wrapped(one: Any) -> bool:
    return isinstance(one, Tensor) and _functorch.is_functorch_wrapped_tensor(one)


def part_ways(groups: list[list[int]], what: str, *, single: bool) -> NoReturn:
    """Give up the run of all examples at once; see :class:`PartingError`."""
    parting = PartingError(groups, what, line_of_the_caller(), single)
    answering = _answering.get()
    if answering is not None:
        answering.parting = parting
    raise parting


def _groups(answers: list[str]) -> list[list[int]]:
    by_answer: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        by_answer.setdefault(answer, []).append(index)
    return list(by_answer.values())


_ASSIGNMENTS = {vars(torch._C.TensorBase)[name].__set__ for name in ("data", "grad")} | {Tensor.set_}
"""What gives a tensor the memory of another. One that got it from a tensor under vmap would be used after vmap is over, and
torch would crash."""

_WITH_SPARSE_GRADIENTS = {F.embedding: 6, F.embedding_bag: 7}
"""What may bring a sparse gradient, and the place of the argument that asks for it. vmap cannot, and noise is dense anyway."""

_WITH_GENERATOR = {torch.poisson, torch.binomial}
"""What takes a generator by its place too."""

_VALUES = {
    Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__, Tensor.__complex__, Tensor.__contains__,
    Tensor.item, Tensor.tolist, Tensor.is_nonzero, torch.is_nonzero, Tensor.equal, torch.equal,
    Tensor.allclose, torch.allclose,
}  # fmt: skip
"""What turns tensors into a value of Python."""

Settle = Callable[[Tensor], Tensor]


def _first(settle: Settle, selector: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    return (settle(selector), *args), kwargs


def _mask(settle: Settle, values: Tensor, mask: Tensor) -> tuple[Any, Any]:
    return (values, settle(mask)), {}


def _condition(settle: Settle, condition: Tensor, *others: Any, **kwargs: Any) -> tuple[Any, Any]:
    return (condition if others or kwargs else settle(condition), *others), kwargs


def _index(settle: Settle, values: Tensor, index: Any) -> tuple[Any, Any]:
    """Boolean masks become the positions where they are true, which vmap can index with."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        if isinstance(part, Tensor) and part.dtype == torch.bool and part.ndim:
            parts += settle(part).nonzero(as_tuple=True)
        else:
            parts.append(part)
    return (values, tuple(parts) if isinstance(index, tuple) or len(parts) != 1 else parts[0]), {}


_SHAPES: dict[Any, Callable[..., tuple[Any, Any]]] = {
    Tensor.nonzero: _first,
    torch.nonzero: _first,
    Tensor.argwhere: _first,
    torch.argwhere: _first,
    Tensor.unique: _first,
    torch.unique: _first,
    Tensor.masked_select: _mask,
    torch.masked_select: _mask,
    torch.where: _condition,
    Tensor.__getitem__: _index,
}
"""What gives tensors whose shape depends on values: the tensor that decides is settled first."""

_LOOKED_AT = frozenset(
    (*_WITH_GENERATOR, *_VALUES, *CELLS, *_ASSIGNMENTS, *_WITH_SPARSE_GRADIENTS, torch.empty, *_SHAPES)
)
"""Whatever is not passed on as it is, beside calls with a late tensor or a generator."""
