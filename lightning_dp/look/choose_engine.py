"""Which engine a run takes, and on which losses it was tried; nothing of the trials is kept or released."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import EngineName, Selection
from lightning_dp.errors import PreflightError
from lightning_dp.look.engine_check import check_engines
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.plan.filtering import GradientFilter
from lightning_dp.step.manual.global_step import global_step
from lightning_dp.step.manual.loss import Wanted, loss_up_to
from lightning_dp.step.manual.objective import Key, ManualObjective
from lightning_dp.step.manual.script import Script, held_by_optimizers
from lightning_dp.step.planned import Planned
from lightning_dp.step.two_points import loss_at_two_points
from lightning_dp.step.user_loss import example_loss, takes_batch_idx


def loss_of_training_step(
    planned: Planned, fixed: Mapping[str, Tensor] | None = None, rule: GradientFilter | None = None
) -> LossFunction:
    """The user's training_step on one example of the first batch.

    Args:
        planned: of whose module.
        fixed: values of parameters that are not differentiated, by name.
        rule: of a filter, by which it is run at two points.
    """
    rest = (0,) if takes_batch_idx(planned.module) else ()
    if rule is not None:
        still = {name: torch.zeros_like(one) for name, one in trainable(planned.module).items()}
        return loss_at_two_points(planned.form, planned.logs, rest, rule, still)
    return example_loss(planned.form, planned.logs, rest, fixed=fixed)


def engine_for(
    planned: Planned,
    name: EngineName,
    most: int,
    loss_function: LossFunction,
    parameters: Mapping[str, nn.Parameter] | None = None,
    cannot: Mapping[str, str] = MappingProxyType({}),
) -> Selection:
    """The engine for one loss, tried on the first examples.

    Args:
        planned: whose module and first examples are used.
        name: the engine asked for, or ``"auto"``.
        most: how many examples a micro-batch may have.
        loss_function: of one example.
        parameters: what is differentiated, by name; ``None`` for everything trainable.
        cannot: engines that are not tried, and why.

    Raises:
        EngineError: the engine asked for cannot run this training_step.
        PreflightError: training_step cannot be run on examples one by one.
    """
    given = trainable(planned.module) if parameters is None else parameters
    return check_engines(planned, name, loss_function, given, most, cannot)


def manual_objective(
    planned: Planned, script: Script, name: EngineName, most: int
) -> tuple[ManualObjective, Selection, LossFunction]:
    """Try engines for each private optimizer seen in the dry run.

    Args:
        planned: whose module and first examples are used.
        script: who steps when.
        name: the engine asked for, or ``"auto"``.
        most: how many examples a micro-batch may have.

    Returns:
        What a step trains; and of the first private step the engine and the loss.

    Raises:
        EngineError: the engine asked for cannot run this training_step.
        PreflightError: training_step writes into parameters before a private step, or several private optimizers would share
            a clip norm that is adapted.
    """
    module = planned.module
    check_one_clip_norm(planned, script)
    seen: list[Wanted] = []
    selections: dict[Key, Selection] = {}
    for index, steps in enumerate(script.batches):
        for number, place in enumerate(steps):
            parameters = held_by_optimizers(module)[place]
            key = place, frozenset(parameters)
            if place in script.public or key in selections:
                continue
            rest = (index,) if takes_batch_idx(module) else ()
            wanted = Wanted(rest, number, place, parameters, global_step(module) + script.taken(index))
            loss_function = loss_up_to(planned.form, planned.logs, wanted)
            selections[key] = engine_for(planned, name, most, loss_function, parameters)
            seen.append(wanted)
    loop = next((one for one in selections.values() if one.engine.is_reference), None)
    if loop is not None:  # one engine for all: each draws random numbers in a way of its own
        selections = dict.fromkeys(selections, loop)
    first = next(iter(selections.values()))
    unseen = loop or Selection(LoopEngine(in_place_of_others=True))
    objective = ManualObjective(script, seen, selections, unseen)
    return objective, first, loss_up_to(planned.form, planned.logs, seen[0])


def check_one_clip_norm(planned: Planned, script: Script) -> None:
    """Refuse to adapt one C to the gradients of several private optimizers.

    Raises:
        PreflightError: see the message.
    """
    clipping = planned.ledger.plan.clipping_rule
    if clipping.adaptation is not None and len(script.private) > 1:
        raise PreflightError(
            f"clipping={clipping.style!r} with {len(script.private)} private optimizers: expected one. Their gradients have "
            "norms of their own, and one C would follow now these and now those. Use clipping='flat' or 'automatic', or name "
            "those that see no private data in public_optimizers."
        )
