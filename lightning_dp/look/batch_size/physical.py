"""How many examples are worked on at once. It changes memory and speed, never the result."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_dp.engines.explain import explain
from lightning_dp.engines.protocol import Engine, LossFunction
from lightning_dp.engines.select import make_engine
from lightning_dp.errors import PreflightError
from lightning_dp.look.batch_size.memory import HELD_LATER, measures_by_default, room_for_micro_batches
from lightning_dp.look.batch_size.search import (
    Found,
    Measured,
    copies,
    fill_memory,
    measured,
    measured_once,
    search_size,
)
from lightning_dp.mechanism.complex import as_real_pairs, coordinates
from lightning_dp.mechanism.seeded_globals import globals_put_back
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.ranks.gathering import gathered
from lightning_dp.ranks.world import World
from lightning_dp.settings import PhysicalBatchSize
from lightning_dp.step.contents import check_nothing_written
from lightning_dp.step.planned import Planned
from lightning_dp.step.undone import undone

ALIKE = 8
"""How many examples have to have one shape for a size to be measured by default, and are copied then."""


def default_physical_batch_size(module: nn.Module, plan: PrivacyPlan, world: World, views: int, most: int = 1) -> int:
    """One micro-batch for nearly every step if its per-example gradients fit in 512 MiB (8 GiB on an accelerator).

    At most 512 views, because their activations take memory too. With a privacy unit, of at most ``most`` examples, the
    size counts examples.
    """
    parameters = coordinates(trainable(module).values())
    room = (2**29 if world.device.type == "cpu" else 2**33) // (4 * max(parameters, 1))
    return max(1, min(room, 512 // views, largest_useful_size(plan, world.size) * most))


def largest_useful_size(plan: PrivacyPlan, ranks: int) -> int:
    """A size that this rank's share of a draw hardly ever exceeds: its mean and four standard deviations.

    Never more than its share of the largest draw there can be.
    """
    share, most = plan.expected_batch_size / ranks, plan.max_batch_size or plan.dataset_size
    return min(math.ceil(share + 4 * math.sqrt(share)), math.ceil(most / ranks))


def settle_physical_batch_size(
    planned: Planned, given: PhysicalBatchSize, engine: Engine, loss_function: LossFunction
) -> PhysicalBatchSize:
    """Find the size that fits, and have the loader use it: with ``"auto"`` one that is fast, by default (on CUDA) a large one.

    It is measured on copies of the first examples. Ranks that look for one agree on the smallest. Parameters, buffers,
    gradients, global random generators and the ledger are as before when it returns. A collective call, whatever is given.

    Args:
        planned: the run, whose first examples are copied. Where nothing can be measured its loader keeps its size.
        given: what the user asked for.
        engine: the one to train with. One that needs no more memory for more examples is not measured.
        loss_function: the user's training_step on one example.

    Returns:
        The size found, or what was given where nothing is looked for.

    Raises:
        PreflightError: training_step changes a tensor of the module.
    """
    module, world, loader = planned.module, planned.world, planned.loader
    if isinstance(given, int) or (given is None and not measures_by_default(world)):
        gathered(world, None)
        return given
    room, found, reason = room_for_micro_batches(world), None, f"engine {engine.name!r} takes one example at a time"
    if given is None:
        room -= HELD_LATER * 4 * coordinates(trainable(module).values())
    if engine.grows_with_rows:
        try:
            with undone(module) as before, torch.enable_grad():
                found = _search(planned, given, engine, loss_function, room)
                check_nothing_written(module, before)
            reason = "a single example does not fit"
        except PreflightError:
            raise
        except Exception as error:  # whatever a training_step has against copies; the default is safe
            reason = f"copies of the first examples cannot be trained on: {explain(error, module)}"
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    size = found.examples if found else loader.physical_batch_size
    agreed = min(other for other in gathered(world, size) if other is not None)
    told = (
        found.describe(room, given)
        if found
        else f"lightning_dp: physical_batch_size={given!r} stays at {size} without being measured: {reason}."
    )
    rank_zero_info(told + ("" if agreed == size else f" Another rank has room for {agreed} only."))
    with globals_put_back(world.device):  # a loader that begins again draws a seed for its workers
        loader.resize(agreed)
    return agreed


def _search(
    planned: Planned, given: PhysicalBatchSize, engine: Engine, loss_function: LossFunction, room: int
) -> Found | None:
    module, world, loader, form = planned.module, planned.world, planned.loader, planned.form
    quick = given is None
    wanted = len(loader.first_indices(ALIKE if quick else 2))
    raw, examples = loader.first_examples(wanted)
    if quick and examples < wanted:
        raise ValueError("they differ in shape, and a long one needs more memory than a short one.")
    batch = form.with_views(form.to_engine(raw), np.arange(examples), 0)

    def measure(rows: int) -> Measured | None:
        copied = copies(batch, examples, rows)

        def fresh() -> Callable[[], object]:
            mine = make_engine(engine.name, module)
            if mine.forms is not None and engine.forms is not None:
                mine.forms.taken = engine.forms.taken
            parameters = as_real_pairs(trainable(module))
            return lambda: mine.clipped_sum(loss_function, parameters, copied, rows, loader.plan.clipping_rule)

        return (measured_once if quick else measured)(fresh, rows, world.device)

    most = 1 if loader.units is None else loader.units.most  # a user's examples need no more memory than as many users
    most *= largest_useful_size(loader.plan, world.size)
    if not quick:
        return search_size(measure, room, most)
    measure(1)  # libraries are loaded and kernels chosen
    return fill_memory(measure, room, most)
