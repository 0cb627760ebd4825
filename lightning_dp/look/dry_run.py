"""training_step under manual optimization, run on a placeholder before training: who steps when, and who may not look."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import overridden
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.placeholder import emptied_or_refused, without_content
from lightning_dp.loading.reading import record, together
from lightning_dp.look.one_example import raise_explained
from lightning_dp.mechanism.seeded_globals import seed_torch
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.commands import Commands, check_private_step, intercepted
from lightning_dp.step.manual.global_step import counting_steps, global_step
from lightning_dp.step.manual.script import Script
from lightning_dp.step.undone import undone
from lightning_dp.step.user_loss import takes_batch_idx

BATCHES, MOST_BATCHES = 8, 64
"""So many batches' worth of training_step are run dry, and up to so many until every private optimizer has stepped: some
modules step an optimizer at every n-th batch only."""

MOST_TOGETHER = 64
"""At most so many rows tell whether training_step takes a batch in pieces."""

PREPARING_HOOKS = ("on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_start")
"""Hooks of a LightningModule that run before its first training_step, and may set what that reads."""


def dry_run(
    module: pl.LightningModule,
    logs: StepCapture,
    form: ExampleForm,
    loader: DataLoader[Any],
    public: Sequence[int],
    physical_batch_size: int | str | None,
) -> Script:
    """Run training_step on a placeholder for the first batches, and see what steps.

    Args:
        module: under manual optimization, its optimizers set up.
        logs: takes what training_step logs.
        form: of an example.
        loader: the user's; the shape of its first example is taken for public.
        public: places in ``configure_optimizers`` of the optimizers that see no private data.
        physical_batch_size: bounds how many rows the placeholder has, which public steps see.

    Raises:
        PreflightError: training_step steers training in a way that cannot be private.
    """
    private = [place for place in range(len(module.trainer.optimizers)) if place not in public]
    batch_size = loader.batch_size or 1
    most = physical_batch_size if isinstance(physical_batch_size, int) else batch_size
    rows = min(batch_size, most) if public else 1
    collate: Any = loader.collate_fn
    first = record(loader.dataset, int(getattr(loader.dataset, "first_present", 0)))  # not 0 in a replay without it

    def emptied(batch: Any) -> Any:
        return without_content(batch) if public else without_content(batch, emptied_or_refused)

    def batch_of(rows: int, emptied: Callable[[Any], Any] = emptied) -> Any:
        return form.closed(emptied(form.to_engine(collate(together(loader.dataset, [first] * rows)))))

    placeholder = batch_of(rows)
    try:
        batches = _steps_of_batches(module, logs, placeholder, private)
    except PreflightError:
        raise
    except Exception as error:
        again = partial(_steps_of_batches, module, logs, private=private)
        raise_explained(error, module, lambda more: again(batch_of(rows - 1 + more)))
    script = Script(batches, placeholder, frozenset(public), tuple(private))
    if not any(place in steps for steps in batches for place in private):
        raise PreflightError(
            f"no private optimizer steps in the first {len(batches)} batches: expected training_step to call "
            "opt.step() of one of self.optimizers(). With automatic_optimization=False Lightning steps none by itself."
        )
    if batch_size > 1:
        one, many = batch_of(1), batch_of(min(batch_size, max(most, 2), MOST_TOGETHER))
        index = batches.index(max(batches, key=len))
        check_no_pieces(module, logs, one, many, index, script.taken(index), private)
    for place in public:
        at = [(index, script.taken(index)) for index, steps in enumerate(batches) if place in steps][:1]
        check_public_steps(module, logs, [place], placeholder, batch_of(rows, lambda batch: batch), at)
    return script


def early_dry_run(*of: Any) -> Script | None:
    """:func:`dry_run`, before the plan is made.

    Returns:
        ``None`` if training_step fails, which may be for want of a hook that prepares the module: then the plan has batches
        to spare, and :func:`late_dry_run` has the same error if it is not.
    """
    try:
        return dry_run(*of)
    except PreflightError:
        raise
    except Exception:
        return None


def late_dry_run(early: Script | None, module: pl.LightningModule, *of: Any) -> Script:
    """:func:`dry_run` after the hooks that may prepare the module, where it has any; else what is known already."""
    if early is not None and not any(overridden(hook, module) for hook in PREPARING_HOOKS):
        return early
    planned = 1 if early is None else early.fewest_steps
    script = dry_run(module, *of)
    if script.fewest_steps != planned and module.trainer.max_steps != -1:
        rank_zero_warn(
            f"{script.fewest_steps} optimizer steps in a batch after the module's hooks have run, and {planned} before: the "
            f"plan turned max_steps={module.trainer.max_steps} into batches with {planned}. Set what training_step needs in "
            "__init__ or configure_model, or give max_epochs in the place of max_steps."
        )
    return script


def _steps_of_batches(
    module: pl.LightningModule, logs: StepCapture, placeholder: Any, private: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Which optimizers step at each of the first batches, in order. Nothing is optimized, logged or kept."""
    batches: list[tuple[int, ...]] = []
    for index in range(MOST_BATCHES):
        seen = {place for steps in batches for place in steps}
        if index >= BATCHES and seen >= set(private):
            break
        taken = sum(map(len, batches))
        batches.append(tuple(_steps_at(module, logs, placeholder, index, private, taken=taken).script))
    return tuple(batches)


def check_no_pieces(
    module: pl.LightningModule,
    logs: StepCapture,
    one: Any,
    many: Any,
    index: int,
    taken: int,
    private: Sequence[int],
) -> None:
    """Refuse a training_step that gives the loss of a batch to ``manual_backward`` in pieces of the batch.

    Args:
        module: under manual optimization, its optimizers set up.
        logs: keeps logs and metrics out.
        one: a batch of one example without anybody's data.
        many: the same with several.
        index: of the batch at which to look.
        taken: how many optimizer steps come before it.
        private: places of the private optimizers.

    Raises:
        PreflightError: see the message.
    """
    try:
        alone, together = (_steps_at(module, logs, batch, index, (), taken=taken) for batch in (one, many))
    except Exception:
        return  # it takes examples in one number only, and so not in pieces; what is wrong besides, training will tell
    for place, a, b in zip(alone.script, alone.losses, together.losses, strict=False):
        lost = any(not math.isfinite(x) for x in a) and all(math.isfinite(x) for x in b)
        if place in private and (len(a) != len(b) or lost):
            found = f"{len(b)} times for a batch and {len(a)} for one example"
            raise PreflightError(
                f"training_step calls manual_backward {'with nan for one example' if len(a) == len(b) else found} before "
                f"the step of optimizer {place}: expected the loss of the whole batch, whatever its size. Gradients cannot be "
                "accumulated by hand over pieces of a batch: every example is a batch of its own, which has no pieces, and "
                "its gradient would be divided by their number. Call manual_backward once, with the mean over the batch, and "
                "limit memory with DifferentialPrivacy(physical_batch_size=...)."
            )


def check_public_steps(
    module: pl.LightningModule,
    logs: StepCapture,
    public: Sequence[int],
    placeholder: Any,
    example: Any,
    batches: list[tuple[int, int]],
) -> None:
    """Refuse a public optimizer whose gradient changes with the batch.

    In training a public step is given the placeholder, so that it *cannot* see the data; this tells the user beforehand that
    it would have wanted to.

    Args:
        module: under manual optimization, its optimizers set up.
        logs: keeps logs and metrics out.
        public: places of the optimizers said to be public.
        placeholder: a batch without anybody's data.
        example: a batch of the same shape with some. **Private**; only compared with the placeholder here.
        batches: numbers of the batches at which to look, and how many optimizer steps come before each.

    Raises:
        PreflightError: see the message.
    """
    for index, taken in batches:
        found = [_steps_at(module, logs, batch, index, (), public, taken).gradients for batch in (placeholder, example)]
        for (place, without), (_, given) in zip(*found, strict=False):
            if any(not torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(without, given, strict=True)):
                raise PreflightError(
                    f"public_optimizers=[... {place} ...], yet the loss of optimizer {place} changes with the batch: expected "
                    "it to use no more of the batch than its shape. Its steps are neither clipped nor charged, and in "
                    "training get a batch of zeros. Draw what it needs at random (labels too), or leave optimizer "
                    f"{place} out of public_optimizers."
                )


@dataclass
class _Steps:
    """The steps taken at one batch, the losses before each, and the gradients of the optimizers asked for."""

    script: list[int]
    losses: list[list[float]] = field(default_factory=list)
    gradients: list[tuple[int, list[Tensor]]] = field(default_factory=list)


def _steps_at(
    module: pl.LightningModule,
    logs: StepCapture,
    batch: Any,
    index: int,
    private: Sequence[int],
    gradients_of: Sequence[int] = (),
    taken: int = 0,
) -> _Steps:
    optimizers, steps = module.trainer.optimizers, _Steps([])

    def on_step(notes: Commands, place: int) -> None:
        count()
        if place in private:
            check_private_step(place, notes.losses, notes.steps)
        steps.losses.append([float(loss.detach()) for loss in notes.losses])
        if place in gradients_of and notes.losses:
            held = [p for group in optimizers[place].param_groups for p in group["params"] if p.requires_grad]
            total = torch.stack([loss.reshape(()) for loss in notes.losses]).sum()
            given = torch.autograd.grad(total, held, retain_graph=True, allow_unused=True, materialize_grads=True)
            steps.gradients.append((place, list(given)))

    rest = (index,) if takes_batch_idx(module) else ()
    with (
        undone(module),
        torch.enable_grad(),
        counting_steps(module, global_step(module) + taken) as count,
        logs.listening(),
        intercepted(module, on_step) as notes,
        module.trainer.precision_plugin.train_step_context(),
    ):
        seed_torch(index)
        module.training_step(batch, *rest)
    if notes.losses:
        raise PreflightError(
            "training_step calls manual_backward without a step of an optimizer after it: expected opt.step() in every "
            "training_step that has a loss. Gradients are not accumulated over batches: one batch is one private step, "
            "whatever its size. Raise the loader's batch_size, and limit memory with "
            "DifferentialPrivacy(physical_batch_size=...)."
        )
    steps.script = notes.steps
    return steps
