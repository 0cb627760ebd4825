"""The same random numbers in each of the passes that several private optimizers make through one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_dp.lightning_internals import put_back_random_states, random_states


class SameDraws:
    """What an example drew up to a step, it draws again when training_step runs for the next private step.

    Else the noise from which a generator made its images would be another in the discriminator's pass. The state of the
    generators is kept at the first pass, for every call of the loss in every micro-batch, and put back in later ones.

    Args:
        device: of the module.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._states: dict[tuple[int, int], dict[str, Any]] = {}
        self._passes, self._micro_batch, self._call = 0, 0, 0

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Around a pass through the sample. After a later one the generators go on from where they were before it."""
        self._passes += 1
        with isolate_rng(self._on_cuda) if self._passes > 1 else nullcontext():
            yield

    def counted(self, micro_batches: Iterable[Any]) -> Iterator[Any]:
        """The micro-batches, with a note of which one is under way."""
        for number, micro_batch in enumerate(micro_batches):
            self._micro_batch, self._call = number, 0
            yield micro_batch

    def at_start_of_a_call(self) -> None:
        """Keep the generators' state, or put back what was kept at this call of the first pass."""
        place = self._micro_batch, self._call
        self._call += 1
        if self._passes <= 1:
            self._states[place] = random_states(self._on_cuda)
        elif place in self._states:
            put_back_random_states(self._states[place])
