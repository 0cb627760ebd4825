"""One call of a layer while the training step runs under vmap: its input and, later, the gradient of its output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from lightning_dp.engines.ghost.below import below_vmap, examples_first
from lightning_dp.engines.ghost.bringing import brought_again
from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.contribution import Contribution


@dataclass(frozen=True)
class Output:
    """What an operation gives for the inputs of all examples.

    Attributes:
        value: the output in whatever shape the kernel gives it, and not a view of something.
        shape: the shape it should have, with the leading axis of B.
        saved: whatever helps with the gradients, for instance statistics, without a graph.
    """

    value: Tensor
    shape: tuple[int, ...]
    saved: Any = None


class Operation(Protocol):
    """What a layer computes from its input, its weight and its bias, and how their gradients are found.

    Attributes:
        takes_copies: whether the weight and the bias given to :meth:`forward` are copies per example, ``(B, ...)``, whose
            gradients autograd brings; if not, they are found by :meth:`of_weight` and :meth:`of_bias`.
    """

    takes_copies: ClassVar[bool]

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Output:
        """The output of all examples at once.

        Args:
            x: inputs with a leading axis of B examples.
            weight: the same for all examples, or copies.
            bias: likewise.
        """
        ...

    def of_weight(self, x: Tensor, g: Tensor, weight: Tensor, saved: Any, buffers: Buffers) -> Contribution:
        """The weight's gradients.

        Args:
            x: inputs, ``(B, ...)``.
            g: gradient with respect to :attr:`Output.value`, in its shape.
            weight: the weight.
            saved: :attr:`Output.saved`.
            buffers: where to take memory for what is written out.
        """
        ...

    def of_bias(self, x: Tensor, g: Tensor) -> Contribution:
        """The bias's gradients, likewise."""
        ...


Deliver = Callable[[Contribution], None]
"""Takes a contribution to where a parameter's contributions are collected."""


@dataclass(frozen=True)
class Operand:
    """A weight or bias as an operation sees it.

    Attributes:
        value: the tensor, without a graph; where ``bring`` is given, only its shape and type.
        deliver: where its contributions go; ``None`` if it is frozen.
        bring: brings the tensor's values together, for as long as somebody holds what it returns.
    """

    value: Tensor
    deliver: Deliver | None = None
    bring: Callable[[], Tensor] | None = None


@contextmanager
def brought(weight: Operand | None, bias: Operand | None) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    """The values of both. What is brought together now is brought again when the backward pass asks for it."""
    operands = [operand for operand in (weight, bias) if operand is not None]
    values = {id(one): one.value if one.bring is None else one.bring() for one in operands}
    with brought_again({values[id(one)]: one.bring for one in operands if one.bring is not None}):
        yield values.get(id(weight)), values.get(id(bias))


_NESTED = "the training step applies torch.func transforms of its own around a layer"


class NestedTransformError(RuntimeError):
    """The training step applies torch.func transforms of its own around a layer."""


@dataclass
class Pass:
    """What the calls of one pass through the training step share.

    Attributes:
        anchor: a zero that requires a gradient. What hangs on it is reached by the backward pass.
        witness: any tensor that vmap maps over, so that a call knows that it happens once per example even if no
            example's data enters it (position embeddings).
        buffers: memory for what is written out.
        copies: per example, of weights and biases, with where the backward pass's gradients of them go.
        context: that in which the pass runs. Hooks of a backward pass on an accelerator run in a thread of autograd's own.
    """

    anchor: Tensor
    buffers: Buffers
    witness: Tensor | None = None
    copies: list[tuple[Tensor, Deliver]] = field(default_factory=list)
    context: Context = field(default_factory=copy_context)

    def call(self, operation: Operation, x: Tensor, weight: Operand | None, bias: Operand | None) -> Tensor:
        """The operation's output for ``x``, and its contributions when the backward pass comes by."""
        assert self.witness is not None

        def computed(rows: Tensor) -> Tensor:
            return _computed(operation, rows, weight, bias, self)

        output = below_vmap(computed, (x,), self.witness)
        if output is None:
            output = _Call.apply(operation, x, weight, bias, self, self.witness)
        return output


class _Call(torch.autograd.Function):
    """A function whose only content is its vmap rule, which sees the inputs of all examples in one tensor.

    The rule runs below vmap, with ordinary autograd: kernels and backward pass are those of the plain batch.
    """

    @staticmethod
    def forward(*_: Any) -> Tensor:
        raise NestedTransformError(_NESTED)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: Any, output: Any) -> None:
        raise NestedTransformError(_NESTED)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        operation: Operation,
        x: Tensor,
        weight: Operand | None,
        bias: Operand | None,
        of: Pass,
        witness: Tensor,
    ) -> tuple[Tensor, int]:
        if torch._C._functorch.is_functorch_wrapped_tensor(x) or len(witness) != info.batch_size:
            raise NestedTransformError(_NESTED)
        return _computed(operation, examples_first(x, in_dims[1], info.batch_size), weight, bias, of), 0


def _computed(operation: Operation, x: Tensor, weight: Operand | None, bias: Operand | None, of: Pass) -> Tensor:
    """The output of all examples, ``(B, ...)``, with hooks for what the backward pass brings."""
    with brought(weight, bias) as values:
        operands = [
            None if one is None or value is None else _given(one, value, operation, len(x), of)
            for one, value in zip((weight, bias), values, strict=True)
        ]
        computed = operation.forward(x, *operands)
    output, shape, saved = computed.value, computed.shape, computed.saved
    del computed, operands, values
    learning = any(operand is not None and operand.deliver is not None for operand in (weight, bias))
    if operation.takes_copies or not learning:  # copies learn by themselves, and what is frozen does not
        return output.reshape(shape)
    if not output.requires_grad:
        output = output + of.anchor
    if output._is_view():
        output = output.clone()  # a hook on a view would be lost if somebody overwrote the output in place
    inputs = x.detach()

    def contribute(g: Tensor) -> None:
        with torch.no_grad():
            if weight is not None and weight.deliver is not None:
                weight.deliver(operation.of_weight(inputs, g, weight.value, saved, of.buffers))
            if bias is not None and bias.deliver is not None:
                bias.deliver(operation.of_bias(inputs, g))

    output.register_hook(lambda g: of.context.run(contribute, g))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return output.reshape(shape)


def _given(operand: Operand, value: Tensor, operation: Operation, examples: int, of: Pass) -> Tensor:
    """What the operation gets of an operand: its value, or copies whose gradients are delivered."""
    deliver = operand.deliver
    if not operation.takes_copies:
        return value
    copies = value.expand(examples, *value.shape)
    if deliver is None:
        return copies
    copies = copies.detach().requires_grad_()
    of.copies.append((copies, deliver))
    return copies
