"""The checks that nothing between dataset and loss couples examples, on a few examples before the first step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only
from torch import Tensor

from lightning_dp.batches.microbatch import take
from lightning_dp.engines.explain import explain
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.uncompiled import uncompiled
from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.loading.form import ExampleForm
from lightning_dp.look.leaks.collation import (
    check_collate_forgets_places,
    check_collate_repeats_itself,
    check_every_example_has_a_row,
)
from lightning_dp.look.leaks.losses import (
    PROBES,
    BatchOf,
    Reduction,
    check_loss_keeps_examples_apart,
    pairs_of_blocks,
)
from lightning_dp.look.leaks.padding import (
    check_collate_keeps_examples_apart,
    check_padding_is_masked,
    row_contents,
)
from lightning_dp.look.leaks.transforms import with_seed
from lightning_dp.mechanism.complex import as_real_pairs
from lightning_dp.mechanism.full_precision import full_precision
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.ranks.gathering import on_every_rank
from lightning_dp.step.contents import check_nothing_written
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.planned import Planned
from lightning_dp.step.undone import undone
from lightning_dp.step.user_loss import example_loss, takes_batch_idx

Losses = Callable[[ExampleForm], Sequence[tuple[LossFunction, Mapping[str, Tensor]]]]
"""By how an example comes back to training_step: each loss whose gradients are clipped, and the parameters they belong to."""


def of_training_step(module: pl.LightningModule, capture: StepCapture) -> Losses:
    """The one loss of automatic optimization: that of the user's training_step, whose logs ``capture`` keeps."""
    rest = (0,) if takes_batch_idx(module) else ()
    return lambda form: [(example_loss(form, capture, rest), trainable(module))]


@dataclass(frozen=True)
class Company:
    """What was seen of examples in one another's company.

    Attributes:
        examples: how many were in one batch.
        reduction: how the loss of a batch follows from theirs.
        unseen: why it was not looked at whether a batch couples them; empty if it was.
        shapes: how many shapes they have among them, each collated by itself.
    """

    examples: int
    reduction: Reduction
    unseen: str = ""
    shapes: int = 1


def check_examples_stay_apart(planned: Planned, losses: Losses) -> Company:
    """Try ``collate_fn``, padding and losses on a few examples, evenly spaced in the dataset. Nothing of it is kept.

    No more examples are worked on at once than in a micro-batch of the run. In micro-batches of one, nothing that is
    private can be mixed, and nothing is looked at. A collective call: ranks with micro-batches of different sizes may see
    different things, and all stop if one does.

    Args:
        planned: the run; of its views one of each example is enough here.
        losses: of training_step; under manual optimization one for each private optimizer.

    Returns:
        What was looked at for the loss of which least was seen, on this rank.

    Raises:
        PreflightError: one example enters another's row or gradient.
    """
    planned = replace(planned, form=planned.form.with_one_view())
    found = on_every_rank(planned.world, lambda: _companies(planned, losses(planned.form)), PreflightError)
    reductions = [company.reduction for company in found]
    if Reduction.SUM in reductions:
        rank_zero_info(
            "lightning_dp: training_step adds up the losses of its examples. The private gradient is the sum divided by the "
            "expected batch size, so a learning rate tuned without privacy has to be multiplied by the batch size."
        )
    if Reduction.WEIGHTED in reductions:
        rank_zero_only(warn_user)(
            "The loss of a batch is neither the mean nor the sum of the losses of its examples, as with a mean over tokens "
            "or with class weights: under differential privacy every example's loss is that of a batch of one (the mean "
            "over its own tokens, without class weights) and counts the same. To weight examples, multiply the loss by "
            "their weights instead of dividing by the sum of weights."
        )
    return next((company for company in found if company.unseen), found[0])


def _companies(planned: Planned, losses: Sequence[tuple[LossFunction, Mapping[str, Tensor]]]) -> list[Company]:
    module, loader = planned.module, planned.loader
    if loader.examples.each:
        return [Company(0, Reduction.UNKNOWN, "each is collated by itself")]
    check_every_example_has_a_row(planned)
    if loader.physical_batch_size == 1:
        return [Company(0, Reduction.UNKNOWN, "micro-batches hold one (physical_batch_size=1)")]
    with undone(module) as before, torch.enable_grad(), uncompiled(), full_precision():  # a look is not worth a graph
        found = [_look(planned, loss, as_real_pairs(parameters)) for loss, parameters in losses]
        check_nothing_written(module, before)
    return found or [Company(0, Reduction.UNKNOWN, "no loss is private")]


def _look(planned: Planned, loss_function: LossFunction, parameters: Mapping[str, Tensor]) -> Company:
    module, loader, form = planned.module, planned.loader, planned.form
    at_once = loader.physical_batch_size
    records = loader.evenly_spaced(PROBES if at_once >= PROBES else PROBES // 2)

    def collate(some: list[Any]) -> Any:
        return form.to_engine(loader.collated(some))

    check_collate_repeats_itself(collate, records, at_once)
    check_collate_keeps_examples_apart(collate, records, at_once)
    check_collate_forgets_places(collate, records, at_once)
    if form.views is None and loader.examples.collate_at_once:  # one by one, nothing is padded to another
        check_padding_is_masked(collate, records, module, loss_function, parameters, at_once)
    shapes = 1 if loader.examples.collate_at_once else len({str(_shapes_of(collate, record)) for record in records})
    examples = PROBES if len(records) == PROBES else PROBES // 2
    if len(records) < examples:
        return Company(0, Reduction.UNKNOWN, f"there are no {examples} of them")

    def batch_of(rows: list[int]) -> Any:
        batch = with_seed(collate, [records[row] for row in rows], 0)
        return form.with_views(batch, np.asarray(rows), 0)

    try:
        if examples <= at_once:
            batch_of = partial(take, batch_of(list(range(examples))))
        if examples <= at_once or _same_in_every_pair(batch_of, examples):
            reduction = check_loss_keeps_examples_apart(module, loss_function, parameters, batch_of, examples)
            return Company(examples, reduction, shapes=shapes)
        reason = "collate_fn makes other rows of an example in other company"
    except PreflightError:
        raise
    except Exception as error:  # a step that takes single examples only, or no room for several at once
        reason = explain(error, module)
    return Company(0, Reduction.UNKNOWN, reason, shapes)


def _shapes_of(collate: Callable[[list[Any]], Any], record: Any) -> list[torch.Size]:
    try:
        contents = row_contents(with_seed(collate, [record], 0))
    except Exception:  # it is said by the step
        return []
    return [] if contents is None else contents[1]


def _same_in_every_pair(batch_of: BatchOf, examples: int) -> bool:
    """Whether each example has the same rows in both pairs that it is in, as with neither padding nor masking at random."""
    contents = [row_contents(batch_of(pair)) or (Counter(), []) for pair in pairs_of_blocks(examples)]
    rows, shapes = zip(*contents, strict=True)
    return bool(rows[0] + rows[3] == rows[1] + rows[2]) and all(shape == shapes[0] for shape in shapes)
