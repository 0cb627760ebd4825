"""The user's training_step on one example, as training without privacy would run it: can it, and does it change its module?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from lightning_dp.batches.microbatch import batch_of_one, take
from lightning_dp.engines.backward import plain_gradient
from lightning_dp.engines.explain import ALONE, OUT_OF_MEMORY, explain
from lightning_dp.engines.loop import as_leaf
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.errors import PreflightError
from lightning_dp.step.contents import Contents, WriteError, check_nothing_written
from lightning_dp.step.refused_writes import with_line

MORE = (2, 3, 4, 8, 16)
"""Rows with which a training_step is tried that fails on one: some code needs a few, such as ``a, b = x.split(4)``."""


def check_one_example(
    module: nn.Module,
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    batch: Any,
    before: Contents,
) -> None:
    """Refuse a training_step that cannot take a batch of one, or writes into its module.

    It runs twice: with the weights as they are, and with weights that are a little off, which shows a write that leaves
    everything as it is at first, such as an average that starts as a copy. What it changes is for the caller to put back.

    Args:
        module: the user's.
        loss_function: training_step on a batch of any number of examples.
        parameters: the trainable parameters.
        batch: a few examples.
        before: what the module's tensors hold.

    Raises:
        PreflightError: see the messages.
        Exception: what training_step itself raises, with a note, if it cannot take several examples either.
    """
    one, leaves = batch_of_one(batch, 0), {name: as_leaf(parameter) for name, parameter in parameters.items()}
    run = partial(loss_function, leaves, one)
    try:
        plain_gradient(loss_function, leaves, one)
        check_nothing_written(module, before)
    except WriteError as error:
        raise with_line(error, module, before, run) from None
    except PreflightError:
        raise
    except Exception as error:
        raise_explained(error, module, lambda rows: plain_gradient(loss_function, leaves, take(batch, [0] * rows)))
    _move(leaves)
    moved = before.again()
    try:
        try:
            run()
        except WriteError:
            raise
        except Exception:
            pass
        check_nothing_written(module, moved)
    except WriteError as error:
        raise with_line(error, module, moved, run) from None


def raise_explained(error: Exception, module: nn.Module, with_rows: Callable[[int], object]) -> NoReturn:
    """Raise what training_step has raised for a batch of one, or say that the batch of one is what is wrong.

    Args:
        error: what it has raised.
        module: the user's.
        with_rows: runs training_step on a batch of that many rows.

    Raises:
        PreflightError: a batch of more is no trouble.
        Exception: ``error``, with a note, otherwise; as it is, for want of memory.
    """
    if isinstance(error, OUT_OF_MEMORY):
        raise error
    enough = next((rows for rows in MORE if _runs(with_rows, rows)), None)
    if enough is None:
        error.add_note(ALONE)
        raise error from None
    raise PreflightError(
        f"training_step cannot take a batch of one: {explain(error, module)}. It runs on {enough} rows. Expected a step for "
        "any number of examples: under differential privacy it runs for each example on its own, and the first axis of every "
        "tensor has length 1. Give squeeze() the axis that it is for, as in squeeze(-1), and take sizes from the batch "
        "(x.chunk(2) of one row is one piece)."
    ) from error


def _runs(with_rows: Callable[[int], object], rows: int) -> bool:
    try:
        with_rows(rows)
    except Exception:
        return False
    return True


def _move(leaves: Mapping[str, Tensor]) -> None:
    """Add something to every weight, the same on all ranks."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in leaves.values():
            noise = torch.randn(leaf.shape, generator=generator).to(leaf)
            leaf.add_(noise.mul_(leaf.abs().add_(1e-2)), alpha=1e-2)
