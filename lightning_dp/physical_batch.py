"""How many examples are worked on at once. It changes memory and speed, never the result."""

from __future__ import annotations

import math

from lightning.pytorch.strategies import Strategy
from torch import nn

from lightning_dp.plan import PrivacyPlan
from lightning_dp.strategy_facts import trainable, world_size_of


def default_physical_batch_size(module: nn.Module, plan: PrivacyPlan, strategy: Strategy, views: int) -> int:
    """One micro-batch for nearly every step if its per-example gradients fit in 512 MiB (8 GiB on an accelerator).

    At most 512 views, because their activations take memory too.
    """
    parameters = sum(parameter.numel() for parameter in trainable(module).values())
    room = (2**29 if strategy.root_device.type == "cpu" else 2**33) // (4 * max(parameters, 1))
    share = plan.expected_batch_size / world_size_of(strategy)
    most = math.ceil(plan.max_batch_size / world_size_of(strategy)) if plan.max_batch_size else room
    return max(1, min(room, 512 // views, math.ceil(share + 4 * math.sqrt(share)), most))
