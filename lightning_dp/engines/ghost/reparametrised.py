"""Layers that compute their weight from other parameters: weight standardisation, ``torch.nn.utils.parametrize``.

Such a layer runs with its plain parameters, so that the weight is computed once and not once per example. The call that
uses the weight is intercepted and gets it without its graph; what comes back for the weight goes through the graph's
vector-Jacobian product, for all examples at once, to the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_dp.engines.ghost.buffers import Buffers
from lightning_dp.engines.ghost.call import Deliver, Operand, Pass
from lightning_dp.engines.ghost.contribution import Contribution, Written
from lightning_dp.engines.ghost.registry import FUNCTIONS, Forward
from lightning_dp.engines.ghost.standardisation import Recognised
from lightning_dp.mechanism.full_precision import full_precision


class Leaves:
    """A layer's plain parameters, each requiring a gradient of its own.

    Args:
        values: name in the module → the parameter.
        deliver: name in the module → where its contributions go.
        buffers: memory for what is written out.
        recognised: standardised weights that earlier passes came upon.
    """

    def __init__(
        self, values: Mapping[str, Tensor], deliver: Callable[[str], Deliver], buffers: Buffers, recognised: Recognised
    ) -> None:
        self._buffers, self._recognised = buffers, recognised
        self.by_name = {name: value.detach().requires_grad_() for name, value in values.items()}
        self._deliver = deliver

    def operand(self, value: Tensor | None) -> Operand | None:
        """``value``, computed from the leaves, without its graph but with the way back through it."""
        if value is None:
            return None
        return Operand(value.detach(), self._way_back(value) if value.requires_grad else None)

    def _way_back(self, value: Tensor) -> Deliver:
        for name, leaf in self.by_name.items():
            if leaf is value:
                return self._deliver(name)

        def back(gradients: Tensor, batched: bool) -> dict[str, Tensor]:
            given = gradients.to(value.dtype)
            names, leaves = list(self.by_name), list(self.by_name.values())
            found = torch.autograd.grad(value, leaves, given, True, allow_unused=True, is_grads_batched=batched)
            return {name: g for name, g in zip(names, found, strict=True) if g is not None}

        def deliver(contribution: Contribution) -> None:
            parameters = {name: leaf.detach() for name, leaf in self.by_name.items()}
            with full_precision():
                projection = self._recognised.projection(value.detach(), parameters, back, self._buffers)
                if projection is None:
                    found = back(contribution.rows(), True)
                    shares: dict[str, Contribution] = {name: Written(g) for name, g in found.items()}
                else:
                    shares = projection.contributions(contribution, {name: p.shape for name, p in parameters.items()})
            for name, share in shares.items():
                self._deliver(name)(share)

        return deliver


def intercepting_forward(
    layer: nn.Module, trainable: Mapping[nn.Module, Mapping[str, str]], leaves: Leaves, of: Pass
) -> Forward:
    """A forward pass for ``layer`` that runs its own with ``leaves`` and keeps the books of the calls inside.

    Args:
        layer: any module.
        trainable: module in ``layer`` → its own parameters' names → their names among the leaves.
        leaves: what the parameters are replaced by.
        of: the pass it belongs to.
    """
    original = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _swapped(trainable, leaves.by_name), _Interception(leaves, of):
            return original(*args, **kwargs)

    return forward


@contextmanager
def _swapped(trainable: Mapping[nn.Module, Mapping[str, str]], leaves: Mapping[str, Tensor]) -> Iterator[None]:
    before = [(owner, own, owner._parameters[own]) for owner, names in trainable.items() for own in names]
    slots: Any
    try:
        for owner, names in trainable.items():
            slots = owner._parameters
            slots.update({own: leaves[name] for own, name in names.items()})
        yield
    finally:
        for owner, own, value in before:
            owner._parameters[own] = value


class _Interception(TorchFunctionMode):
    def __init__(self, leaves: Leaves, of: Pass) -> None:
        super().__init__()
        self._leaves, self._pass = leaves, of

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = FUNCTIONS.get(func)
        if read is None:
            return func(*args, **kwargs)
        operation, x, weight, bias = read(*args, **kwargs)
        if (
            operation is None
            or not any(isinstance(t, Tensor) and t.requires_grad for t in (weight, bias))
            or any(isinstance(t, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in (weight, bias))
        ):
            return func(*args, **kwargs)
        return self._pass.call(operation, x, self._leaves.operand(weight), self._leaves.operand(bias))


def computes_its_weight(layer: nn.Module) -> bool:
    """Whether it is worth a try to keep books of ``layer``'s calls from inside its own forward pass.

    True for leaf modules with parameters, and for parametrised ones. If a parameter is then used in another way than as
    an operand of an operation with a rule, the pass notices and is repeated without.
    """
    if nn.utils.parametrize.is_parametrized(layer):
        return True
    return "forward" not in layer.__dict__ and bool(layer._parameters) and not any(True for _ in layer.children())
