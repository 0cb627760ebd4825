"""Which layers have a rule, and how their forward pass is replaced by one that keeps the books."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dp.engines.ghost.call import Deliver, Operand, Operation, Pass
from lightning_dp.engines.ghost.convolution import Convolution
from lightning_dp.engines.ghost.embedding import Embedding
from lightning_dp.engines.ghost.keeper import Keeper, stand_in
from lightning_dp.engines.ghost.linear import Linear
from lightning_dp.engines.ghost.normalisation import GroupNorm, LayerNorm, RMSNorm
from lightning_dp.mechanism.instead import Instead

Forward = Callable[..., Any]

_INSTANCE_NORMS = {nn.InstanceNorm1d: 2, nn.InstanceNorm2d: 3, nn.InstanceNorm3d: 4}


def operation_of(layer: nn.Module, x: Tensor) -> tuple[Operation, Tensor]:
    """The operation that ``layer`` applies to ``x``, and ``x`` after whatever padding comes before it.

    Args:
        layer: one for which :func:`has_rule` holds.
        x: an example's input.
    """
    if isinstance(layer, nn.modules.conv._ConvNd):
        axes = len(layer.stride)
        padding = layer.padding
        if isinstance(padding, str) or layer.padding_mode != "zeros":
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x, padding = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode), (0,) * axes
        operation: Operation = Convolution(
            layer.stride, tuple(padding), layer.dilation, layer.groups, own_axes=x.ndim - axes - 1
        )
    elif isinstance(layer, nn.Embedding):
        operation = Embedding(layer.padding_idx)
    elif isinstance(layer, nn.GroupNorm):
        operation = GroupNorm(layer.num_groups, layer.eps)
    elif isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        operation = GroupNorm(layer.num_features, layer.eps, own_axes=x.ndim - _INSTANCE_NORMS[type(layer)])
    elif isinstance(layer, nn.LayerNorm):
        operation = LayerNorm(tuple(layer.normalized_shape), layer.eps)
    elif isinstance(layer, nn.RMSNorm):
        operation = RMSNorm(tuple(layer.normalized_shape), layer.eps)
    else:
        operation = Linear()
    return operation, x


def has_rule(layer: nn.Module) -> bool:
    """Whether ``layer`` computes what its class in ``torch.nn`` computes, from parameters of its own.

    A subclass counts if it inherits the forward pass. A forward pass that somebody has put in the layer's place, or a
    setting that the rules do not know, does not.
    """
    kind = type(layer)
    if "forward" in layer.__dict__ or "weight" not in layer._parameters:
        return False
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        stock = next(c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, c))
        return all(getattr(kind, name) is getattr(stock, name) for name in ("forward", "_conv_forward"))
    if isinstance(layer, nn.Embedding):
        return kind.forward is nn.Embedding.forward and layer.max_norm is None and not layer.scale_grad_by_freq
    if kind in _INSTANCE_NORMS:
        return not layer.track_running_stats
    return any(
        isinstance(layer, stock) and kind.forward is stock.forward
        for stock in (nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    )


def book_keeping_forward(layer: nn.Module, operands: Mapping[str, Operand], of: Pass) -> Forward:
    """A forward pass for ``layer`` that keeps the books.

    Args:
        layer: one for which :func:`has_rule` holds.
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
            operands[place] = Operand(stand_in(shapes[name]), to, partial(keeper.bring, name))
        else:
            operands[place] = Operand(trainable[name].detach(), to)
    return operands
