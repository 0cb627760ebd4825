"""The engine of a run by layers, tried on two examples with the parameters in shards: no rank ever holds them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_dp.batches.microbatch import batch_of_one
from lightning_dp.engines.agreement import DisagreementError, inert
from lightning_dp.engines.explain import explain
from lightning_dp.engines.protocol import LossFunction, scalar_loss
from lightning_dp.engines.select import Selection, engine_that_brings_layers
from lightning_dp.engines.uncompiled import compiled_parts, uncompiled
from lightning_dp.look.engine_check import engine_check_batch, tolerance
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.ranks.gathering import gathered
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.sharding import in_shards, reshard
from lightning_dp.step.contents import written
from lightning_dp.step.planned import Planned
from lightning_dp.step.undone import undone


def select_in_shards(
    planned: Planned, engine_name: str, make_loss: Callable[[Mapping[str, Tensor]], LossFunction]
) -> Selection | None:
    """The engine ``ghost``, if it can bring all matrices layer by layer, and gives the gradients that FSDP2 itself gives.

    Compared are the norms of two examples and the sum of their gradients, in eval mode, with plain backward passes through
    FSDP2's hooks. A collective call; every rank runs the same examples.

    Args:
        planned: the run, whose module is sharded, and whose first examples are used.
        engine_name: the engine asked for, or ``"auto"``.
        make_loss: makes the user's training_step on one example.

    Returns:
        ``None`` without ``gather="layer"``, and where the engines have to be tried with whole parameters: another engine was
        asked for, or this one cannot do without, which is said.
    """
    module, world, loader = planned.module, planned.world, planned.loader
    if world.gather == "step":
        return None
    engine = engine_that_brings_layers(engine_name, module)
    able = gathered(world, engine is not None and loader.plan.resolution is None)
    if engine is None or not all(able):
        return None
    reshard(module)  # an evaluation leaves some parts whole
    own = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}
    kept = engine.keeper = Layerwise(world, own, engine.bringable() & own.keys())
    with undone(module) as before, torch.enable_grad(), uncompiled(), full_precision(), inert(module):
        most = min(gathered(world, loader.physical_batch_size))  # the ranks run the same examples
        batch, examples = engine_check_batch(planned, most)
        failure = None
        try:
            seed_torch(0)
            expected, norms = _by_fsdp(module, make_loss({}), [batch_of_one(batch, i) for i in range(examples)])
            with in_shards(module):
                given, fixed = kept.begin(0)
                seed_torch(0)
                found = engine.clipped_sum(make_loss(fixed), given, batch, examples, torch.inf)
            rows = {name: total / world.size for name, total in kept.taken().items()}
            for name, total in found.gradient.items():
                chunk = -(-len(total) // world.size)
                rows[name] = total[world.rank * chunk : (world.rank + 1) * chunk]
            _check_same_as_fsdp(
                {"norms": norms, **expected}, {"norms": found.norms, **rows}, tolerance(module) * float(norms.max())
            )
        except Exception as error:  # the trial with whole parameters knows more ways, and has the better message
            failure = explain(error, module)
        finally:
            reshard(module)
            for parameter in module.parameters():
                parameter.grad = None
        changed = before.changed()
    failures = [told for told in gathered(world, failure) if told is not None]
    if failures:
        rank_zero_info(f"lightning_dp: engines are tried with whole parameters: {failures[0]}")
        return None
    if changed:
        raise written(module, changed)
    return Selection(engine, uncompiled=tuple(compiled_parts(module)))


def _by_fsdp(
    module: nn.Module, loss_function: LossFunction, examples: list[object]
) -> tuple[dict[str, Tensor], Tensor]:
    """This rank's rows of the sum of the examples' gradients, and the norms of each, by FSDP2's own backward pass.

    FSDP2 takes the mean over the ranks, which have the same example.
    """
    sums: dict[str, Tensor] = {}
    squares = []
    for example in examples:
        loss, _ = loss_function({}, example)
        scalar_loss(loss).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        square = torch.zeros((), dtype=torch.float64)
        for name, parameter in trainable(module).items():
            gradient = parameter.grad
            if isinstance(gradient, DTensor):
                rows = gradient.to_local().float()
                sums[name] = sums[name] + rows if name in sums else rows
                square += rows.double().square().sum().cpu()
            parameter.grad = None
        squares.append(square)
    total = torch.stack(squares).to(next(module.parameters()).device)
    dist.all_reduce(total)
    return sums, total.sqrt()


def _check_same_as_fsdp(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], allowed: float) -> None:
    """Raise unless both are the same; what is missing in ``expected`` has to be zero."""
    off = {name: tensor - expected[name] if name in expected else tensor for name, tensor in found.items()}
    most = {name: float(tensor.abs().max()) if tensor.numel() else 0.0 for name, tensor in off.items()}
    worst = max(most, key=lambda name: most[name])
    if not most[worst] <= max(allowed, torch.finfo(torch.float32).tiny):
        raise DisagreementError(
            f"its gradients differ from FSDP2's, most in {worst}, by {most[worst]:.2g} where {allowed:.2g} is rounding"
        )
