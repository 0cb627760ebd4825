"""Layers whose output for one example depends on the others."""

from __future__ import annotations

from torch import nn

from lightning_dp.errors import PreflightError


def batch_norms(module: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of ``module`` that are there but harmless now (frozen and in eval mode)."""
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def check_batch_norms_rest(module: nn.Module) -> None:
    """Refuse BatchNorm layers that were switched to train mode since training began.

    Raises:
        PreflightError: see the message.
    """
    mode = [layer for layer in batch_norms(module) if layer.training]
    if mode:
        raise PreflightError(
            f"{len(mode)} BatchNorm layers were switched to train mode during training: expected eval mode. Do not "
            "call .train() on a frozen part; batch statistics mix the examples."
        )


def mixes_examples(layer: nn.Module) -> bool:
    """Whether one example's output of this layer would depend on the others, or leave traces in its buffers."""
    if isinstance(layer, nn.modules.instancenorm._InstanceNorm):
        return layer.training and layer.track_running_stats
    if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return False
    return layer.training or any(parameter.requires_grad for parameter in layer.parameters())
