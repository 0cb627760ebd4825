"""The parameters that a private step is about."""

from __future__ import annotations

from torch import nn


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are clipped, noised and stepped, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
