"""What Lightning does to a batch between loader and training_step, done to one micro-batch at a time."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import Strategy

from lightning_dp.batches.axis import BatchAxis, from_front, to_front
from lightning_dp.batches.containers import close_containers, open_containers, own_copy
from lightning_dp.batches.microbatch import Apart, BatchAxisError, Element
from lightning_dp.lightning_internals import BEFORE_TRANSFER, attribute, before_transfer, transfer
from lightning_dp.loading.loader import LogicalBatch
from lightning_dp.loading.rows import check_all_came
from lightning_dp.mechanism.instead import Instead


def to_device(strategy: Strategy, batch: Any, drawn: int | None = None) -> Any:
    """Convert a micro-batch to the Trainer's precision and move it to the device, the user's hooks included.

    Containers of the user's own come back in parts (:mod:`lightning_dp.batches.containers`) and tensors with their
    examples on the first axis (:mod:`lightning_dp.batches.axis`), for the stages that follow. What hooks at the start
    of a batch change in it (:mod:`lightning_dp.step.batch_hooks`) is done to each example.

    Args:
        strategy: connected to the module; its precision plugin, device and the module's (or data module's)
            ``on_before_batch_transfer``, ``transfer_batch_to_device`` and ``on_after_batch_transfer`` are used.
        batch: a collated micro-batch.
        drawn: how many examples it is of, if that is to be checked.

    Raises:
        DroppedExamplesError: some of them are missing.
    """
    hooks: Any = getattr(getattr(strategy, "private_step", None), "batch_hooks", None)
    if isinstance(batch, Apart):
        moved = [_moved(strategy, element.content) for element in batch.elements]
        return Apart([Element(one if hooks is None else hooks.applied_to_one(one)) for one in moved])
    batch = to_front(open_containers(_moved(strategy, batch)), batch_axis_of(strategy))
    if drawn is not None:
        check_all_came(batch, drawn)
    return batch if hooks is None else hooks.applied(batch)


def _moved(strategy: Strategy, batch: Any) -> Any:
    """A batch after what Lightning does to it between loader and training_step."""
    module = strategy.lightning_module
    assert module is not None
    batch = strategy.precision_plugin.convert_input(batch)
    return transfer(module, before_transfer(module, batch), strategy.root_device)


def batch_axis_of(strategy: Strategy) -> BatchAxis:
    """Where the callback says that a batch has its examples; on the first axis if nothing is said."""
    axis: BatchAxis = getattr(getattr(strategy, "private_step", None), "batch_axis", 0)
    return axis


def as_training_step_takes_it(strategy: Strategy, batch: Any) -> Any:
    """A batch, or one example of it, as it was before :func:`to_device` rearranged it for the stages between."""
    if isinstance(batch, Apart):
        if len(batch.elements) != 1:
            raise BatchAxisError(
                f"{len(batch.elements)} examples that were collated one by one: expected one. They cannot be put together to a batch."
            )
        return own_copy(batch.elements[0].content)
    return close_containers(from_front(batch, batch_axis_of(strategy)))


def let_logical_batches_through(module: pl.LightningModule) -> None:
    """Spare the user's ``on_before_batch_transfer`` the logical batch; its micro-batches go through it one by one."""
    original = attribute(type(module), BEFORE_TRANSFER)

    def hook(batch: Any, dataloader_idx: int = 0) -> Any:
        return batch if isinstance(batch, LogicalBatch) else original(module, batch, dataloader_idx)

    module.__dict__[BEFORE_TRANSFER] = Instead(module, BEFORE_TRANSFER, hook)


def stop_letting_through(module: pl.LightningModule) -> None:
    """Leave the module as it was before :func:`let_logical_batches_through`."""
    module.__dict__.pop(BEFORE_TRANSFER, None)
