"""How the forward pass of a layer with a rule is replaced by one that keeps the books."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from lightning_dp.engines.ghost.bringing import shape_only
from lightning_dp.engines.ghost.call import Deliver, Operand, Pass
from lightning_dp.engines.ghost.registry import Forward, OperationOf
from lightning_dp.engines.keeper import Keeper
from lightning_dp.mechanism.instead import Instead


def book_keeping_forward(
    layer: nn.Module, operation_of: OperationOf, operands: Mapping[str, Operand], of: Pass
) -> Forward:
    """A forward pass for ``layer`` that keeps the books.

    Args:
        layer: one that has a rule.
        operation_of: gives the operation and its input, as the rule says.
        operands: the layer's trainable parameters among ``weight`` and ``bias``, and those that somebody else keeps.
        of: the pass it belongs to.
    """

    def operand(name: str) -> Operand | None:
        frozen = getattr(layer, name, None)
        return operands.get(name) or (None if frozen is None else Operand(frozen.detach()))

    def forward(input: Tensor) -> Tensor:
        operation, x = operation_of(layer, input)
        return of.call(operation, x, operand("weight"), operand("bias"))

    return forward


@contextmanager
def replaced(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """The modules with other forward passes, and as they were afterwards."""
    before = {layer: layer.__dict__.get("forward") for layer in forwards}
    try:
        for layer, forward in forwards.items():
            layer.__dict__["forward"] = Instead(layer, "forward", forward, before[layer])
        yield
    finally:
        for layer, original in before.items():
            if original is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.__dict__["forward"] = original


def trainable_of(layer: nn.Module, names: Mapping[int, str]) -> dict[str, str]:
    """The layer's own trainable parameters: name in the layer → name in the module (the first, if tied)."""
    return {
        own: names[id(parameter)]
        for own, parameter in layer._parameters.items()
        if parameter is not None and id(parameter) in names
    }


def operands_of(
    own: Mapping[str, str],
    trainable: Mapping[str, Tensor],
    deliver: Callable[[str], Deliver],
    keeper: Keeper | None = None,
    shapes: Mapping[str, Tensor] | None = None,
) -> dict[str, Operand]:
    """An operand for each of a layer's own parameters.

    Args:
        own: name in the layer → name in the module.
        trainable: the trainable parameters, by name in the module.
        deliver: gives where the contributions to a parameter go.
        keeper: brings those that it keeps, trainable or not.
        shapes: all parameters by name in the module, whose shapes and types count.
    """
    operands = {}
    for place, name in own.items():
        to = deliver(name) if name in trainable else None
        if keeper is not None and name in keeper.names:
            assert shapes is not None
            operands[place] = Operand(shape_only(shapes[name]), to, partial(keeper.bring, name))
        else:
            operands[place] = Operand(trainable[name].detach(), to)
    return operands
