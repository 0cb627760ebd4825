"""The engine of a run, tried on two examples before the first step. Nothing of the trial is kept or released."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.batches.axis import has_lists
from lightning_dp.batches.microbatch import Apart, BatchAxisError, batch_of_one, check_batch_axis
from lightning_dp.batches.seeded import seeded
from lightning_dp.batches.units import of_two
from lightning_dp.engines.agreement import check_agreement, tolerance_of
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.plain import check_nothing_is_lost
from lightning_dp.engines.protocol import Engine, LossFunction
from lightning_dp.engines.select import EngineName, Selection, select_engine
from lightning_dp.engines.shared_writes import refusing_writes, tells_of_a_write
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.errors import PreflightError
from lightning_dp.loading.rows import rows_in
from lightning_dp.look.leaks.collation import check_not_left_out
from lightning_dp.look.leaks.transforms import check_rows_stay_apart
from lightning_dp.look.one_example import check_one_example
from lightning_dp.mechanism.complex import as_real_pairs
from lightning_dp.mechanism.seeded_globals import globals_put_back
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.step.contents import check_nothing_written
from lightning_dp.step.planned import Planned
from lightning_dp.step.refused_writes import undone_unless_written
from lightning_dp.step.undone import undone

CHECKED_EXAMPLES = 2


def check_engines(
    planned: Planned,
    engine_name: EngineName,
    loss_function: LossFunction,
    parameters: Mapping[str, nn.Parameter] | None = None,
    most: int = CHECKED_EXAMPLES,
    cannot: Mapping[str, str] = MappingProxyType({}),
) -> Selection:
    """The first engine that runs this training_step, and agrees with the loop.

    Args:
        planned: the run, whose module is tried on its first examples.
        engine_name: the engine asked for, or ``"auto"``.
        loss_function: the user's training_step on one example.
        parameters: what is differentiated, by name; ``None`` for everything trainable.
        most: of micro-batches of one, only one example is tried: in those no hook can mix anything.
        cannot: engines that are not tried, and why.

    Raises:
        EngineError: the engine asked for cannot run this training_step.
        PreflightError: training_step cannot take a batch of one or changes a tensor of the module, or a hook mixes the
            examples.
    """
    module = planned.module
    given = as_real_pairs(trainable(module) if parameters is None else parameters)
    with undone(module) as before, torch.enable_grad():
        on_device, examples = engine_check_batch(planned, most)
        check_batch_axis(on_device, examples)
        with undone(module), uncompiled():  # a look is not worth a graph
            check_one_example(module, loss_function, given, on_device, before)
        one, clipping = batch_of_one(on_device, 0), planned.loader.plan.clipping_rule
        drawing = seeded(on_device, np.arange(examples, dtype=np.uint64), 0)

        def check(engine: Engine) -> None:
            if engine.name in cannot:
                raise NotImplementedError(cannot[engine.name])
            try:
                if not engine.is_reference:
                    check_nothing_is_lost(engine, loss_function, given, one, module, tolerance(module))
                with globals_put_back(planned.world.device):
                    engine.clipped_sum(loss_function, given, drawing, examples, clipping)
                if not engine.is_reference:
                    check_agreement(engine, loss_function, given, on_device, examples, module)
            except Exception as error:
                if not engine.is_reference and tells_of_a_write(error):
                    watched = refusing_writes(loss_function, on_device, before.tensors.values())
                    _refuse_writes(watched, given, on_device, examples, module)
                raise

        selection = select_engine(engine_name, check, module, planned.loader.plan.resolution)
        check_nothing_written(module, before)
    return selection


def _refuse_writes(
    watched: LossFunction, parameters: Mapping[str, Tensor], batch: Any, examples: int, module: nn.Module
) -> None:
    """Raise what ``watched`` has to say of a pass of the loop. What else that raises is left to the engine ``loop``."""
    try:
        with undone_unless_written(module):
            LoopEngine().clipped_sum(watched, parameters, batch, examples, torch.inf)
    except PreflightError:
        raise
    except Exception:
        pass


def _first_examples(planned: Planned, count: int) -> tuple[Any, int]:
    """The first examples; where some are missing, or collate_fn fails, it is looked whether it leaves examples out."""
    loader, form = planned.loader, planned.form
    several = [*loader.first_indices(count), *next(loader.scattered(16))]
    try:
        batch, examples = loader.first_examples(count)
    except Exception:
        check_not_left_out(planned, several)
        raise
    if isinstance(batch, Apart):
        return batch, examples
    rows = rows_in(form.opened(batch, strict=False))
    if rows is not None and rows < examples:
        check_not_left_out(planned, several)
    return batch, examples


def tolerance(module: pl.LightningModule) -> float:
    """How far two gradients that should be the same may differ, as a part of the longest, in the precision of training."""
    return tolerance_of(module.trainer.precision_plugin.precision)


def engine_check_batch(planned: Planned, most: int) -> tuple[Any, int]:
    """The first examples as engines get them, with their views and on the device, and how many they are.

    Args:
        planned: the run.
        most: of micro-batches of one, only one example is tried: in those no hook can mix anything.

    Raises:
        PreflightError: a hook or transform mixes the examples.
        BatchAxisError: views are wanted of examples that are collated one by one.
    """
    form = planned.form
    raw_batch, examples = _first_examples(planned, min(CHECKED_EXAMPLES, most))
    if isinstance(raw_batch, Apart):  # nothing between dataset and training_step sees two examples
        if form.views is not None:
            raise BatchAxisError(
                "AugmentationMultiplicity with examples that are collated one by one: expected a batch with one row for each "
                "example, of which views can be made. Let collate_fn return tensors with rows, or leave it out."
            )
        return form.to_engine(raw_batch), examples
    batch = form.opened(raw_batch, strict=False)
    if has_lists(form.axis):  # two tensors are no list of two examples: of one example there must be a list of one
        one = planned.loader.first_examples(1)[0]
        check_batch_axis(form.opened(one, strict=False), 1)
    check_rows_stay_apart(
        lambda raw: form.to_engine(form.closed(raw)),
        batch,
        examples,
        "on_before_ or on_after_batch_transfer",
    )

    def prepared(raw: Any) -> Any:
        return form.with_views(form.to_engine(form.closed(raw)), np.arange(examples), torch.initial_seed())

    if form.views is not None:
        check_rows_stay_apart(prepared, batch, examples, "the transform of AugmentationMultiplicity")
    return of_two(prepared(batch), examples, form.units), examples
