"""The proof on a few examples, before training, that an engine gives the gradients that plain backward passes give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.batches.seeded import seeded
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.seeded_globals import globals_put_back

TOLERANCE = 1e-6
"""Largest difference, as a part of the longest gradient, in float64."""

TOLERANCE_FLOAT32 = 1e-2
"""The same where the module does not run in float64: an activation at its kink alone moves a gradient by 5e-4."""


TOLERANCE_BFLOAT16 = 5e-2
"""Where gradients are compared in bfloat16: the order of additions alone makes 1e-2."""


def tolerance_of(precision: object) -> float:
    """How far two gradients that should be the same may differ, as a part of the longest, at this precision of a Trainer."""
    return TOLERANCE_BFLOAT16 if str(precision).startswith("bf16") else TOLERANCE_FLOAT32


class DisagreementError(RuntimeError):
    """An engine and plain backward passes gave different gradients."""


def check_agreement(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    batch: Any,
    examples: int,
    module: nn.Module,
) -> str:
    """Compare ``engine`` with one backward pass per example, on the module in eval mode.

    Both run in float64 where the module lets them: parameters, buffers and floating-point inputs are replaced by copies
    for these calls, the module is not changed. In eval mode random layers are inert, and what an example's loss draws by
    itself is the same in both.
    Compared are all examples' norms and the sum of the unclipped gradients, parameter by parameter.

    Args:
        engine: the engine to be checked.
        loss_function: the loss of a batch of one. It takes frozen parameters and buffers by name like trainable ones.
        parameters: the trainable parameters.
        batch: a few examples.
        examples: how many.
        module: whose parameters and buffers these are.

    Returns:
        The type in which they were compared, ``"float64"`` or ``"float32"``.

    Raises:
        DisagreementError: they differ by more than rounding.
    """
    batch = seeded(batch, np.arange(examples, dtype=np.uint64), 0)
    engines: tuple[Engine, ...] = (engine, LoopEngine(in_place_of_others=True))
    with uncompiled(), full_precision(), inert(module), globals_put_back():
        try:
            pair = _in_float64(engines, loss_function, parameters, batch, examples, module)
        except Exception:  # a module that makes float32 tensors of its own; what else is wrong shows in float32 too
            pair = [one.clipped_sum(loss_function, parameters, batch, examples, torch.inf) for one in engines]
            _check_same(pair, TOLERANCE_FLOAT32)
            return "float32"
        _check_same(pair, TOLERANCE)
        return "float64"


def _in_float64(
    engines: tuple[Engine, ...],
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    batch: Any,
    examples: int,
    module: nn.Module,
) -> list[ClippedSum]:
    fixed = {
        name: double(tensor.detach())
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
        if name not in parameters
    }

    def in_double(given: Mapping[str, Tensor], example: Any) -> tuple[Tensor, Any]:
        return loss_function({**fixed, **given}, example)

    trainable = {name: double(parameter.detach()) for name, parameter in parameters.items()}
    doubled = pytree.tree_map(double, batch)
    return [one.clipped_sum(in_double, trainable, doubled, examples, torch.inf) for one in engines]


def _check_same(pair: list[ClippedSum], tolerance: float) -> None:
    ours, plain = pair
    finite = torch.isfinite(plain.norms)
    if not torch.equal(finite, torch.isfinite(ours.norms)):
        raise DisagreementError("its gradients are not finite where plain backward passes give finite ones")
    size = float(plain.norms[finite].max()) if bool(finite.any()) else 0.0
    allowed = tolerance * max(size, torch.finfo(plain.norms.dtype).tiny)
    differences = {
        name: float((ours.gradient[name] - gradient).abs().max()) if gradient.numel() else 0.0
        for name, gradient in plain.gradient.items()
    }
    differences["norms"] = float((ours.norms - plain.norms)[finite].abs().max()) if bool(finite.any()) else 0.0
    worst = max(differences, key=lambda name: differences[name])
    if not differences[worst] <= allowed:
        raise DisagreementError(
            f"its gradients differ from those of plain backward passes, most in {worst}, by {differences[worst]:.2g} where "
            f"the longest gradient has norm {size:.2g}"
        )


def double(value: Any) -> Any:
    """A floating-point tensor in float64; anything else as it is."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@contextmanager
def inert(module: nn.Module) -> Iterator[None]:
    """Every layer in eval mode, and in its own mode again afterwards."""
    modes = [(layer, layer.training) for layer in module.modules()]
    try:
        for layer, _ in modes:
            layer.training = False
        yield
    finally:
        for layer, training in modes:
            layer.training = training
