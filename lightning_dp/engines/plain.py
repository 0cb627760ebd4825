"""The proof on one example, before training, that an engine loses nothing of the gradient that plain training gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.batches.seeded import Seeded, seeded
from lightning_dp.engines.agreement import TOLERANCE_FLOAT32, DisagreementError, inert
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.seeded_globals import globals_put_back

NOTHING = 1e-5
"""A gradient that is at most this part of the longest counts as none: a bias before a normalisation has 1e-8 by rounding."""

LEAST = 1e-2
"""Gradients shorter than this part of the whole are compared as if they were as long: their rounding errors are the others'."""


def check_nothing_is_lost(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    example: Any,
    module: nn.Module,
    tolerance: float,
) -> None:
    """Compare an engine with a plain backward pass on the module's own parameters, parameter by parameter.

    The engines ``ghost`` and ``vmap`` put other tensors in the parameters' places. What reaches a parameter by another way, by
    a reference kept in a list, or in a backward pass that runs a part of the forward pass again, is lost to them, and would
    read as a smaller gradient, or as none.

    Args:
        engine: the engine to be checked.
        loss_function: the loss of a batch of one.
        parameters: the trainable parameters themselves.
        example: a batch of one.
        module: in eval mode meanwhile, so that random layers are inert.
        tolerance: how far two gradients that should be the same may differ, as a part of their length.

    Raises:
        DisagreementError: they differ by more than rounding.
    """

    def summed(one: Engine, drawing: Seeded) -> ClippedSum:
        return one.clipped_sum(loss_function, parameters, drawing, 1, torch.inf)

    drawing, loop = seeded(example, np.arange(1, dtype=np.uint64), 0), LoopEngine(in_place_of_others=True)
    with uncompiled(), inert(module), full_precision(), globals_put_back():  # a look is not worth a graph
        plain, again, ours = summed(loop, drawing), summed(loop, drawing.with_other_draws()), summed(engine, drawing)
    size = float(plain.norms[0])
    if not size < torch.inf:
        return
    for name, gradient in plain.gradient.items():
        own, found = float(gradient.norm()), float(ours.gradient[name].norm())
        if own > NOTHING * size and found == 0.0:
            raise DisagreementError(
                f"its gradients differ from those of plain backward passes: there is none of {name}, which has one of norm "
                f"{own:.2g}"
            )
        random = not torch.equal(gradient, again.gradient[name])
        off = float((ours.gradient[name] - gradient).norm())
        least = LEAST if tolerance <= TOLERANCE_FLOAT32 else 1.0
        if not random and not off <= tolerance * max(own, least * size, torch.finfo(torch.float32).tiny):
            raise DisagreementError(
                f"its gradients differ from those of plain backward passes, in {name} by {off:.2g} where that has norm "
                f"{own:.2g}"
            )
