"""The checks that nothing between dataset and loss couples examples, on a few examples before the first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dp import preflight
from lightning_dp.engines.explain import explain
from lightning_dp.functional.gradient import LossFunction
from lightning_dp.loading.loader import PoissonLoader
from lightning_dp.loading.transfer import to_device
from lightning_dp.mixing.losses import PROBES, Reduction, check_loss_keeps_examples_apart
from lightning_dp.mixing.padding import check_collate_keeps_examples_apart, check_padding_is_masked
from lightning_dp.strategy_facts import module_of, trainable

WithViews = Callable[[Any, npt.NDArray[np.int64], int], Any]
"""``(batch on the device, indices, seed)`` → the batch with its views."""


def check_examples_stay_apart(
    strategy: Strategy, loader: PoissonLoader, loss_function: LossFunction | None, with_views: WithViews | None
) -> None:
    """Try ``collate_fn``, padding and loss on a few examples, evenly spaced in the dataset. Nothing of it is kept.

    Args:
        strategy: whose module is tried, on its device.
        loader: its dataset and ``collate_fn``.
        loss_function: the user's training_step; ``None`` to look at ``collate_fn`` alone.
        with_views: gives each example its K views, or ``None`` without any.

    Raises:
        PreflightError: one example enters another's row or gradient.
    """
    module = module_of(strategy)
    buffers = preflight.buffer_versions(module)
    with isolate_rng(), torch.enable_grad(), torch.compiler.set_stance("force_eager"):  # a look is not worth a graph
        reduction = _reduction(strategy, loader, loss_function, with_views)
    preflight.check_buffers(module, buffers)
    if reduction is Reduction.SUM:
        rank_zero_info(
            "lightning_dp: training_step adds up the losses of its examples. The private gradient is the sum divided by the "
            "expected batch size, so a learning rate tuned without privacy has to be multiplied by the batch size."
        )
    if reduction is Reduction.WEIGHTED:
        rank_zero_warn(
            "The loss of a batch is neither the mean nor the sum of the losses of its examples, as with a mean over tokens "
            "or with class weights: under differential privacy every example's loss is that of a batch of one (the mean "
            "over its own tokens, without class weights) and counts the same. To weight examples, multiply the loss by "
            "their weights instead of dividing by the sum of weights."
        )


def _reduction(
    strategy: Strategy, loader: PoissonLoader, loss_function: LossFunction | None, with_views: WithViews | None
) -> Reduction:
    module, records = module_of(strategy), loader.evenly_spaced(PROBES)

    def collate(some: list[Any]) -> Any:
        return to_device(strategy, loader.collate_fn(some))

    check_collate_keeps_examples_apart(collate, records)
    if loss_function is None:
        return Reduction.UNKNOWN
    if with_views is None:
        check_padding_is_masked(collate, records, module, loss_function, trainable(module))
    batch = collate(records)
    if with_views is not None:
        batch = with_views(batch, np.arange(len(records)), 0)
    try:
        return check_loss_keeps_examples_apart(module, loss_function, trainable(module), batch, len(records))
    except preflight.PreflightError:
        raise
    except Exception as error:  # a step that takes single examples only, or no room for several at once
        rank_zero_info(
            f"lightning_dp: whether the loss of a batch couples its examples could not be looked at: {explain(error, module)}. "
            "In training every example is a batch of its own."
        )
        return Reduction.UNKNOWN
