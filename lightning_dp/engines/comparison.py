"""One example's clipped contribution by an engine and by a plain backward pass, in the precision and the mode of training."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_dp.batches.seeded import Seeded
from lightning_dp.engines.agreement import DisagreementError
from lightning_dp.engines.explain import OUT_OF_MEMORY
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import Engine, LossFunction
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.mechanism.adaptive import INDICATOR
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.plan.clipping import Clipping

LEAST = 1e-3
"""Contributions shorter than this part of the sensitivity are compared as if they were as long: they are mostly rounding."""


LONGER = 1e-3
"""By this part a contribution may be longer than the sensitivity: far more than float32 rounds, far less than a mistake."""


def compare_contributions(
    engine: Engine,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    example: Seeded,
    clipping: Clipping,
    tolerance: float,
) -> None:
    """Compare what an engine and the engine ``loop`` add to the sum for one example.

    Nothing is compared where one of them cannot run the example (the step itself says so then). An example draws the
    same in both. Where they differ and a plain pass with other draws differs too, the engine may draw in another order, and
    all that is said is whether it was clipped.

    Args:
        engine: the engine to be compared.
        loss_function: the loss of a batch of one.
        parameters: the trainable parameters.
        example: a batch of one, and what it draws from.
        clipping: the plan's.
        tolerance: how far two contributions that should be the same may differ, as a part of their length.

    Raises:
        DisagreementError: they differ by more than rounding, or the engine's is longer than an example's may be.
    """

    def contribution(one: Engine, example: Seeded) -> dict[str, Tensor]:
        return one.clipped_sum(loss_function, parameters, example, 1, clipping).gradient

    loop = LoopEngine(in_place_of_others=True)
    with uncompiled(), full_precision():
        try:
            ours, plain = contribution(engine, example), contribution(loop, example)
        except OUT_OF_MEMORY:
            raise
        except Exception:
            return
        length = _length(ours)
        if length > (1 + LONGER) * clipping.sensitivity:
            raise DisagreementError(
                f"engine {engine.name!r} gives a clipped gradient of norm {length:.4g}, and its norm is to be at most "
                f"{clipping.sensitivity:.4g}"
            )
        ours, plain = _gradient(ours), _gradient(plain)
        size, off = _length(plain), _distance(ours, plain)
        least = LEAST * clipping.sensitivity if math.isfinite(clipping.sensitivity) else 0.0
        if not math.isfinite(size) or off <= tolerance * max(size, least):
            return
        if _distance(_gradient(contribution(loop, example.with_other_draws())), plain) > 0.0:
            return  # it draws, and engines may draw in another order
    raise DisagreementError(
        f"engine {engine.name!r} and a plain backward pass of the same example give clipped gradients that differ by {off:.2g} "
        f"where the plain one has norm {size:.2g}"
    )


def _gradient(contribution: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what adapts C, which rounding alone may change where a norm is close to C. Its length counts in the bound."""
    return {name: part for name, part in contribution.items() if name != INDICATOR}


def _length(gradient: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in gradient.values()))


def _distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return _length({name: one[name].double() - other[name].double() for name in other})
