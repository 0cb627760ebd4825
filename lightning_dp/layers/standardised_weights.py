"""Weights that are standardised on every use: ordinary PyTorch, for models and for layers that are replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

EPSILON = 1e-4
"""The smallest sum of squares by whose root a channel's weights are divided."""


def standardise(weight: Tensor, gain: Tensor) -> Tensor:
    """Ŵ = (w − mean(w)) · gain · rsqrt(max(var(w) · fan_in, 1e-4)), for each output channel.

    Mean and population variance are over the channel's fan_in numbers. So Ŵ has mean zero and sum of squares gain²: the
    convolution of independent inputs of unit variance has variance gain². A single number per channel would be gone with
    its mean: fan_in has to be at least 2.

    Args:
        weight: w, ``(out_channels, ...)``.
        gain: ``(out_channels,)``.

    Source: S. Qiao et al. 2019 (arXiv 1903.10520); A. Brock, S. De and S. L. Smith 2021 (arXiv 2101.08692), equation 5.
    """
    variance, mean = torch.var_mean(weight, dim=tuple(range(1, weight.ndim)), correction=0, keepdim=True)
    scale = torch.rsqrt(torch.clamp(variance * weight[0].numel(), min=EPSILON)) * gain.view_as(mean)
    return (weight - mean) * scale


class WeightStandardisation(nn.Module):
    """The parametrization of a weight that standardises it, with a learnable gain for each output channel.

    The gain starts from the weight's own scale, so that at the start Ŵ = w − mean(w).

    Args:
        weight: at the start, ``(out_channels, ...)``.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        rows = weight.detach().flatten(1)
        square = rows.var(1, correction=0) * rows.shape[1]
        self.gain = nn.Parameter(square.clamp(min=EPSILON).sqrt())

    @override
    def forward(self, weight: Tensor) -> Tensor:
        """Ŵ of w."""
        return standardise(weight, self.gain)


def standardise_weight_of(layer: nn.Module) -> None:
    """Let ``layer`` use its ``weight`` standardised from now on; the parameter is ``parametrizations.weight.original``."""
    parametrize.register_parametrization(layer, "weight", WeightStandardisation(layer.get_parameter("weight")))


def is_standardised(layer: nn.Module) -> bool:
    """Whether :func:`standardise_weight_of` has been here."""
    lists: Any = getattr(layer, "parametrizations", {})
    return "weight" in lists and any(isinstance(one, WeightStandardisation) for one in lists["weight"])
