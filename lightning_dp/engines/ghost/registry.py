"""What has a rule: each rule says so itself, by a decorator, in a file of its own under ``rules/``.

A layer that is one operation on its ``weight`` and ``bias`` is given by :func:`rule`, a layer that makes several calls by
:func:`composite_rule`, and a function that layers of other kinds call in their forward pass by :func:`function_rule`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from lightning_dp.engines.ghost.call import Operation, Pass

if TYPE_CHECKING:
    from lightning_dp.engines.ghost.reparametrised import Leaves

MATRIX = 2
"""The number of axes of a weight that is a matrix."""

Forward = Callable[..., Any]

OperationOf = Callable[[Any, Tensor], tuple[Operation, Tensor]]
"""``(layer, an example's input) -> (the operation, its input)``: the input with whatever padding comes before it."""

CompositeForward = Callable[[Any, Mapping[str, str], "Leaves", Pass], Forward]
"""``(layer, names, leaves, pass) -> a forward pass that keeps the books``, see :func:`composite_rule`."""

Arguments = tuple[Operation | None, Tensor, Tensor | None, Tensor | None]
"""What a function's call computes: operation, input, weight, bias. No operation: the rule does not cover this call."""

Reader = Callable[..., Arguments]
"""The function's own arguments → :data:`Arguments`."""

_Rule = TypeVar("_Rule", bound=Callable[..., Any])


def _always(layer: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class LayerRule:
    """The rule of a kind of layer that is one operation.

    Attributes:
        kind: the class.
        operation_of: gives the operation for a layer and an input.
        inherited: methods that a subclass may not override.
        when: whether the rule knows the layer's settings.
    """

    kind: type[nn.Module]
    operation_of: OperationOf
    inherited: tuple[str, ...]
    when: Callable[[Any], bool]

    def covers(self, layer: nn.Module) -> bool:
        """Whether ``layer`` computes what its class in ``torch.nn`` computes, from parameters of its own.

        A subclass counts if it inherits the forward pass. A forward pass that somebody has put in the layer's place, or a
        setting that the rule does not know, does not.
        """
        if "forward" in layer.__dict__ or "weight" not in layer._parameters:
            return False
        return all(getattr(type(layer), name) is getattr(self.kind, name) for name in self.inherited) and self.when(
            layer
        )


@dataclass(frozen=True)
class CompositeRule:
    """The rule of a kind of layer that makes several calls, its submodules included.

    Attributes:
        kind: the class.
        forward: gives the forward pass that keeps the books.
        when: whether the rule knows the layer's settings.
    """

    kind: type[nn.Module]
    forward: CompositeForward
    when: Callable[[Any], bool]

    def covers(self, layer: nn.Module) -> bool:
        """Whether ``layer`` computes what its class in ``torch.nn`` computes."""
        inherits = type(layer).forward is self.kind.forward and "forward" not in layer.__dict__
        return inherits and self.when(layer)


LAYERS: dict[type[nn.Module], LayerRule] = {}
"""Kind of layer → its rule. A subclass has the rule of its nearest ancestor that has one."""

COMPOSITES: dict[type[nn.Module], CompositeRule] = {}
"""Kind of layer that makes several calls → its rule."""

FUNCTIONS: dict[Callable[..., Any], Reader] = {}
"""Function of torch → how its arguments are read."""


def rule(
    *kinds: type[nn.Module], inherited: tuple[str, ...] = ("forward",), when: Callable[[Any], bool] = _always
) -> Callable[[_Rule], _Rule]:
    """Register how layers of these kinds are computed, as a function :data:`OperationOf`.

    Args:
        kinds: classes of layers.
        inherited: methods that make the class what it is. A subclass that overrides one has no rule.
        when: whether the rule knows the settings of a layer.

    Example:
        >>> from lightning_dp.engines.ghost.rules.linear import Linear
        >>> class Head(nn.Module):
        ...     pass
        >>> @rule(Head)
        ... def head(layer: Head, x: Tensor) -> tuple[Operation, Tensor]:
        ...     return Linear(), x
        >>> LAYERS.pop(Head).operation_of is head
        True
    """

    def register(operation_of: _Rule) -> _Rule:
        LAYERS.update({kind: LayerRule(kind, operation_of, inherited, when) for kind in kinds})
        return operation_of

    return register


def composite_rule(
    kind: type[nn.Module], when: Callable[[Any], bool] = _always
) -> Callable[[CompositeForward], CompositeForward]:
    """Register a forward pass of layers of this kind that keeps the books of the calls inside.

    The function takes the layer, the names of its trainable parameters (name in the layer → name in the module), their
    plain values, and the pass it belongs to.
    """

    def register(forward: CompositeForward) -> CompositeForward:
        COMPOSITES[kind] = CompositeRule(kind, forward, when)
        return forward

    return register


def function_rule(*functions: Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Register how the arguments of these functions are read, as a function :data:`Reader`."""

    def register(read: _Rule) -> _Rule:
        FUNCTIONS.update(dict.fromkeys(functions, read))
        return read

    return register


def rule_of(layer: nn.Module) -> LayerRule | None:
    """The rule that covers ``layer``, if it is one operation."""
    found = next((LAYERS[kind] for kind in type(layer).__mro__ if kind in LAYERS), None)
    return found if found is not None and found.covers(layer) else None


def composite_rule_of(layer: nn.Module) -> CompositeRule | None:
    """The rule that covers ``layer``, if it makes several calls."""
    found = next((COMPOSITES[kind] for kind in type(layer).__mro__ if kind in COMPOSITES), None)
    return found if found is not None and found.covers(layer) else None


def is_composite(layer: nn.Module) -> bool:
    """Whether ``layer`` is of a kind that makes several calls, whether or not its rule covers it."""
    return isinstance(layer, tuple(COMPOSITES))
