"""Which parameters only layers with a rule use, so that they need not be there while other layers run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from lightning_dp.engines.ghost.registry import MATRIX, is_composite, rule_of


def used_by_rules_alone(module: nn.Module, handled: Mapping[str, str]) -> set[str]:
    """Names of the matrices and kernels, trainable and frozen, that are weights of layers with a rule and nothing else.

    Vectors, such as biases, are left out: they are small. A frozen parameter that somebody reads apart from its layer is not
    noticed here.

    Args:
        module: with whole parameters.
        handled: trainable parameter → how the engine found its gradient, see
            :attr:`lightning_dp.engines.ghost.engine.GhostEngine.handled`.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    parts_of_others = {
        part
        for layer in module.modules()
        if is_composite(layer) or nn.utils.parametrize.is_parametrized(layer)
        for part in layer.modules()
    }
    users: dict[str, set[str | None]] = defaultdict(set)
    for layer in module.modules():
        by_rule = rule_of(layer) is not None and layer not in parts_of_others
        for place, parameter in layer._parameters.items():
            if parameter is not None:
                use = by_rule and place in ("weight", "bias") and parameter.ndim >= MATRIX
                users[names[id(parameter)]].add(type(layer).__name__ if use else None)
    return {
        name
        for name, kinds in users.items()
        if None not in kinds and (name not in handled or set(handled[name].split(" + ")) == kinds)
    }
