"""Before the first step: can this module train with its parameters brought together layer by layer? Nothing is released."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_dp.engines.explain import explain
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.look.engine_check import engine_check_batch, tolerance
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.ranks.gathering import gathered, on_every_rank
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.sharding import full_parameters, in_shards, reshard
from lightning_dp.step.planned import Planned
from lightning_dp.step.spectral import SpectralNorms
from lightning_dp.step.undone import undone

MakeLoss = Callable[[Mapping[str, Tensor]], LossFunction]
"""From the parameters that are not differentiated and not brought, by name, to the loss function."""


def start_layerwise(planned: Planned, selection: Selection, make_loss: MakeLoss) -> Layerwise | None:
    """What keeps the parameters during the steps, tried on two examples; ``None`` unless the strategy has ``gather="layer"``.

    The two gradients are taken with whole parameters and layer by layer, and compared, unless the engine was tried in shards.
    A collective call.

    Args:
        planned: the run, whose module is sharded, and whose first examples are used.
        selection: the engine, which has run this training_step before; it brings layers from here on.
        make_loss: makes the user's training_step on one example.

    Raises:
        PreflightError: the module cannot be trained so; the message says what to do.
    """
    module, world = planned.module, planned.world
    if world.gather == "step":
        return None
    engine = on_every_rank(world, lambda: _usable(planned, selection), PreflightError)
    reshard(module)  # an evaluation leaves some parts whole
    with undone(module), full_precision():
        most = min(gathered(world, planned.loader.physical_batch_size))  # the ranks run the same examples
        batch, examples = engine_check_batch(planned, most)

        def summed(parameters: Mapping[str, Tensor], fixed: Mapping[str, Tensor]) -> ClippedSum:
            with isolate_rng(), torch.enable_grad():
                seed_torch(0)
                return engine.clipped_sum(make_loss(fixed), parameters, batch, examples, torch.inf)

        before, engine.keeper, expected = engine.keeper, None, None
        names = set() if before is None else set(before.names)
        if before is None:
            with full_parameters(module, world):
                expected = summed(trainable(module), {})
                names = engine.bringable()
        own = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
        kept = Layerwise(world, own, names & own.keys())
        engine.keeper = kept
        try:
            with in_shards(module):
                found = summed(*kept.begin(0))
        except Exception as error:
            raise PreflightError(
                f"gather='layer' cannot run this training_step: {explain(error, module)}. Expected it to use the parameters of "
                "its layers by calling these layers alone. Use gather='step'."
            ) from error
        kept.check_order()
        if expected is not None:
            on_every_rank(world, lambda: _check_same_as_whole(planned, expected, found, kept.taken()), PreflightError)
    part = sum(own[name].numel() for name in kept.names) / sum(p.numel() for p in own.values())
    rank_zero_info(
        f"lightning_dp: {len(kept.names)} parameters, {part:.1%} of all numbers, are brought layer by layer."
    )
    return kept


def _usable(planned: Planned, selection: Selection) -> Engine:
    """The engine, if it and the module can do it at all."""
    if not selection.engine.brings_layers:
        secure = selection.describe() if selection.engine.sum_dtype is None else "secure=True"
        raise PreflightError(
            f"gather='layer' with engine={selection.engine.name!r} ({secure}): expected 'ghost', which needs a parameter only "
            "where its layer runs. Use gather='step'."
        )
    if SpectralNorms(planned.module).found:
        raise PreflightError(
            "gather='layer' with spectral_norm: expected none, for its power iteration reads the whole weight between the "
            "steps. Use gather='step'."
        )
    return selection.engine


def _check_same_as_whole(
    planned: Planned, expected: ClippedSum, found: ClippedSum, shards: Mapping[str, Tensor]
) -> None:
    """Raise unless this rank's rows are those of the gradient with whole parameters, on as many copies as there are ranks."""
    ranks, rank = planned.world.size, planned.world.rank
    size = float(expected.norms.max())
    for name, whole_gradient in expected.gradient.items():
        if name in shards:
            chunk = -(-len(whole_gradient) // ranks)
            off = whole_gradient[rank * chunk : (rank + 1) * chunk] - shards[name] / ranks
        else:
            off = whole_gradient - found.gradient[name]
        most = float(off.abs().max()) if off.numel() else 0.0
        if not most <= tolerance(planned.module) * max(size, torch.finfo(whole_gradient.dtype).tiny):
            raise PreflightError(
                f"gather='layer': the gradient of {name} differs by {most:.2g} from that with whole parameters, where the "
                f"longest gradient has norm {size:.2g}: expected the same. Use gather='step'."
            )
