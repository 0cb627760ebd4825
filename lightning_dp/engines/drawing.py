"""Passes over a micro-batch in which what an example draws depends on that example alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dp.batches.seeded import Seeded
from lightning_dp.engines.decisions import part_ways
from lightning_dp.engines.entropy import asked, watched
from lightning_dp.engines.row_draws import FusedAttentionError, RowDraws, a_draw
from lightning_dp.mechanism.seeded_globals import seed_globals

T = TypeVar("T")

Draws = Callable[[], AbstractContextManager[Any]]
"""A context for the forward pass (and for a backward pass that computes parts of it again) in which examples draw."""


class Drawing:
    """How the training step of a run draws, and the passes that go with it.

    Most training steps draw nothing, and then a pass is all there is. If torch's generator has moved, the pass is made again
    with :class:`~lightning_dp.engines.row_draws.RowDraws`, and so is every later one. If NumPy's or Python's has, the operating
    system was asked, or torch has drawn unseen, the examples part ways and run one by one, with these seeded for each.
    """

    def __init__(self) -> None:
        self._seen, self._plain_attention, self._apart = False, False, False

    def always(self) -> None:
        """Expect draws from the beginning, so that no pass is ever made again."""
        self._seen = True

    def one_pass(self, batch: Any, run: Callable[[Any, Draws], T]) -> T:
        """The result of ``run`` for this micro-batch.

        Args:
            batch: :class:`~lightning_dp.batches.seeded.Seeded`; another one draws from the global generators as they are.
            run: takes the examples, and the context in which they draw. It may be called several times.

        Raises:
            PartingError: several examples draw what can only be drawn for one at a time.
        """
        if not isinstance(batch, Seeded):
            return run(batch, nullcontext)
        if self._apart:
            self._part(len(batch.seeds))
        while True:
            draws = RowDraws(batch.seeds, batch.common) if self._seen else None
            start = _Start(batch)
            try:
                with watched(), sdpa_kernel(SDPBackend.MATH) if self._plain_attention else nullcontext():
                    found = run(batch.content, nullcontext if draws is None else draws.open)
            except FusedAttentionError:
                self._plain_attention = True
                continue
            if draws is None and start.torch_moved():
                self._seen = True
                continue
            if len(batch.seeds) > 1:
                unseen = draws is not None and start.torch_moved(draws.draws)
                if unseen or asked() or start.others_moved():
                    self._part(len(batch.seeds))
            return found

    def _part(self, examples: int) -> None:
        if examples > 1:
            self._apart = True
            what = "draws from NumPy's or Python's generators, or seeds torch's,"
            part_ways([[place] for place in range(examples)], what, single=True)


class Alone:
    """Passes over one example at a time, which draws from the global generators, seeded for it."""

    def one_pass(self, batch: Any, run: Callable[[Any, Draws], T]) -> T:
        """The result of ``run`` for this example; see :meth:`Drawing.one_pass`."""
        if not isinstance(batch, Seeded):
            return run(batch, nullcontext)
        seed = int(batch.seeds[0]) % 2**64
        seed_globals(seed, _cuda())
        return run(batch.content, nullcontext)


class _Start:
    """The global generators at the start of a pass, seeded: torch's alike for all examples, the others for the first."""

    def __init__(self, batch: Seeded) -> None:
        self._seed, self._common = int(batch.seeds[0]) % 2**64, batch.common
        seed_globals(self._seed, None)
        torch.default_generator.manual_seed(batch.common)
        self._on_cuda = _cuda_states()

    def torch_moved(self, expected: int = 0) -> bool:
        """Whether torch's generators are not where so many draws leave them."""
        now = torch.default_generator.get_state()
        torch.default_generator.manual_seed(self._common)
        for _ in range(expected):
            a_draw()
        there = torch.default_generator.get_state()
        return not torch.equal(now, there) or self._on_cuda != _cuda_states()

    def others_moved(self) -> bool:
        """Whether NumPy's or Python's generator has moved."""
        found = random.random(), np.random.random_sample()  # noqa: NPY002 (the generators that old code draws from)
        seed_globals(self._seed, None)
        return found != (random.random(), np.random.random_sample())  # noqa: NPY002 (likewise)


def _cuda() -> torch.device | None:
    """The CUDA device in use."""
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else None


def _cuda_states() -> list[tuple[int, int]]:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return []
    return [(one.initial_seed(), one.get_offset()) for one in torch.cuda.default_generators]
