"""The engines of a run during its steps: where the fastest cannot run a micro-batch, the next one does."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_dp.batches.microbatch import BatchAxisError
from lightning_dp.batches.seeded import Seeded
from lightning_dp.engines.explain import ALONE, OUT_OF_MEMORY, explain
from lightning_dp.engines.loop import LoopEngine
from lightning_dp.engines.protocol import ClippedSum, Engine, LossFunction
from lightning_dp.engines.select import EngineError, Selection
from lightning_dp.engines.shared_writes import refusing_writes, tells_of_a_write
from lightning_dp.mechanism.seeded_globals import has_cuda
from lightning_dp.plan.clipping import Clipping

PATIENCE = 3
"""An engine that has failed so often in a row is not tried again."""


class FallBack(Engine):
    """The engines of a :class:`Selection`, as one.

    A training step may come to what an engine cannot run only after training has begun: a coin, a warm-up, a transform that
    meets some examples alone. Engines give the same sum, so the next one runs that micro-batch from its beginning, with the
    random numbers that it would have drawn in the first place, and nothing of the attempt is kept.

    Args:
        selection: of the run. It remembers which engine is given up.
        module: the user's, for messages.
        passed_on: errors that are nobody's limit, but say what is wrong with the training step.
        undone: a context in which nothing that happens to the module is kept; it may refuse what has happened.
        within_reach: gives the tensors of which it is compared whether training_step has written into them.
    """

    def __init__(
        self,
        selection: Selection,
        module: nn.Module,
        passed_on: tuple[type[Exception], ...] = (),
        undone: Callable[[], AbstractContextManager[Any]] = nullcontext,
        within_reach: Callable[[], Iterable[Tensor]] = tuple,
    ) -> None:
        self._within_reach = within_reach
        self._selection, self._module, self._undone = selection, module, undone
        self._passed_on: tuple[type[BaseException], ...] = (*passed_on, BatchAxisError, *OUT_OF_MEMORY)
        self.name, self.sum_dtype = selection.engine.name, selection.engine.sum_dtype

    def clipped_sum(
        self,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        batch: Any,
        examples: int,
        clipping: Clipping | float,
        *,
        counted: int | None = None,
    ) -> ClippedSum:
        """See :class:`lightning_dp.engines.protocol.Engine`.

        Raises:
            EngineError: the engine was asked for by name and cannot run this.
            SharedWriteError: an engine has met a write into a tensor that was there before training_step.
            Exception: what the training step itself raises for a batch of one, and want of memory, which is no engine's limit.
        """
        selection, given = self._selection, loss_function
        put_back = _nothing if isinstance(batch, Seeded) else _draws()  # each engine seeds for each example anew
        engines = [selection.engine, *selection.slower]
        if selection.engine.keeper is not None:
            del engines[1:]  # the others need all parameters, and the ranks go layer by layer together
        for place, engine in enumerate(engines):
            if selection.failures.get(engine.name, 0) >= PATIENCE and place + 1 < len(engines):
                continue
            try:
                found = engine.clipped_sum(given, parameters, batch, examples, clipping, counted=counted)
            except self._passed_on:
                raise
            except Exception as error:
                if engine.is_reference:
                    error.add_note(ALONE)
                    raise
                if engine.keeper is not None:
                    raise
                reason = explain(error, self._module)
                if tells_of_a_write(error):  # into a tensor of its own, or into one that the next example would read
                    given = refusing_writes(loss_function, batch, self._within_reach())
                if place + 1 == len(engines):
                    put_back()
                    with self._undone():
                        _raise_if_its_own(given, parameters, batch, examples, clipping, counted)
                    raise EngineError(
                        f"engine={engine.name!r} cannot run this training_step any more: {reason}. Nothing of this step is "
                        "released. Use engine='auto', which takes another engine where one cannot, or change that line."
                    ) from error
                self._tell_once(engine.name, engines[place + 1].name, reason)
                selection.failures[engine.name] = selection.failures.get(engine.name, 0) + 1
                put_back()
            else:
                if selection.failures.get(engine.name, 0) < PATIENCE:
                    selection.failures.pop(engine.name, None)
                return found
        raise AssertionError("the last engine returns or raises")

    def _tell_once(self, engine: str, other: str, reason: str) -> None:
        if engine not in self._selection.told:
            self._selection.told.add(engine)
            warnings.warn(
                f"engine {engine!r} cannot run some micro-batches of this training_step: {reason}. {other!r} runs them: the "
                "result is the same, and slower. (Which micro-batches these are may depend on private examples.)",
                stacklevel=2,
            )


def _raise_if_its_own(
    loss_function: LossFunction,
    parameters: Mapping[str, Tensor],
    batch: Any,
    examples: int,
    clipping: Clipping | float,
    counted: int | None,
) -> None:
    """Raise what plain backward passes raise as well: an error of training_step's own. Their gradients are dropped."""
    try:
        LoopEngine().clipped_sum(loss_function, parameters, batch, examples, clipping, counted=counted)
    except Exception as error:
        error.add_note(ALONE)
        raise


def _nothing() -> None:
    """What examples draw does not come from the generators as they are."""


def _draws() -> Callable[[], None]:
    """What puts the global random generators back to where they are now."""
    state = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state() if has_cuda() else None
    python, array = random.getstate(), np.random.get_state()  # noqa: NPY002 (the generator that old code draws from)

    def put_back() -> None:
        torch.set_rng_state(state)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)
        random.setstate(python)
        np.random.set_state(array)  # noqa: NPY002 (likewise)

    return put_back
