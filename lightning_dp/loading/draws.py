"""The draw of each step, and this rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lightning_dp.batches.units import Indices, Piece, Units, pieces
from lightning_dp.loading.held_records import HeldRecords
from lightning_dp.mechanism.cyclic import cyclic_poisson_sample, groups_of
from lightning_dp.mechanism.keystream import Keystream
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import (
    allocation,
    cut,
    distinct_steps,
    exact_allocation,
    exact_poisson_sample,
    poisson_sample,
    rank_slice,
)
from lightning_dp.plan.mechanism import NoiseKind
from lightning_dp.plan.privacy_plan import PrivacyPlan


class Draws:
    """The global draw of each step, made once and shared by the schedule of workers and the loop.

    Args:
        dataset: what is drawn from.
        plan: how.
        key: its SAMPLING stream is used.
        rank: whose part is given.
        world_size: the number of ranks.
        units: whose each example is, or ``None``.
        begun_at: number of the step with which ``key`` began: blocks are counted from there.

    Attributes:
        left_out: numbers that are dropped from every draw, as if they had never been in the data: a replay's neighbour.
    """

    def __init__(
        self,
        dataset: Any,
        plan: PrivacyPlan,
        key: RandomKey,
        rank: int,
        world_size: int,
        units: Units | None,
        begun_at: int = 0,
    ) -> None:
        self.dataset_size, self._plan, self._key = len(dataset if units is None else units), plan, key
        self._units = units
        self._groups: list[Indices] | None = None
        self._mine: Callable[[Indices], Indices] = lambda drawn: rank_slice(drawn, rank, world_size)
        if isinstance(dataset, HeldRecords):
            self._mine = dataset.held
        self._made: dict[int, tuple[Indices, int]] = {}
        self._begun_at = begun_at
        self._allocated: dict[int, Indices] = {}
        self.left_out: list[int] = []

    def at(self, step: int) -> tuple[Indices, int]:
        """This rank's part of the step's draw, sorted, and how many all ranks together have. Both are **private**."""
        if step not in self._made:
            drawn = self._drawn(step)
            if self._plan.max_batch_size is not None:
                drawn = cut(self._key.generator(Stream.SAMPLING, step, 1), drawn, self._plan.max_batch_size)
            if self.left_out:
                drawn = drawn[~np.isin(drawn, self.left_out)]
            self._made[step] = (self._mine(drawn), len(drawn))
        return self._made[step]

    def _drawn(self, step: int) -> Indices:
        mechanism, q = self._plan.mechanism, self._plan.sampling_probability
        if mechanism.sampling.block > 1:
            return self._in_the_block(step)
        if mechanism.sampling.scheme == "cyclic_poisson":
            if self._groups is None:
                self._groups = groups_of(self._key, self.dataset_size, mechanism.groups)
            return cyclic_poisson_sample(self._key, self._groups, step, min(1.0, mechanism.groups * q))
        return _DRAWN[mechanism.noise.kind](self._key, step, self.dataset_size, q)

    def _in_the_block(self, step: int) -> Indices:
        """The examples whose step of the block this is."""
        block = self._plan.mechanism.sampling.block
        number, place = divmod(step - self._begun_at, block)
        if number < 0:
            raise ValueError(f"step={step}: expected at least {self._begun_at}, where the randomness began.")
        first = self._begun_at + (number * block if self._plan.sampling == "random_allocation" else 0)
        if first not in self._allocated:
            self._allocated = dict([*self._allocated.items()][-1:])  # that of the block before is still read
            make = _ALLOCATED[self._plan.mechanism.noise.kind]
            draw = make(self._key, first, self.dataset_size)
            self._allocated[first] = distinct_steps(draw, block, self._plan.mechanism.sampling.participations)
        return np.flatnonzero((self._allocated[first] == place).any(axis=1))

    def pieces(self, step: int, physical_batch_size: int) -> list[Piece]:
        """This rank's part of the step's draw, micro-batch by micro-batch."""
        return pieces(self._units, self.at(step)[0], physical_batch_size, self._key, step)

    def seeds(self, step: int, examples: Indices) -> tuple[list[int], int]:
        """What seeds the generators before each of these examples is read, and before all of them are together.

        The first are functions of key, step and index alone, the last of key and step.
        """
        found: list[int] = self._key.seeds(Stream.READING, step, examples).tolist()
        return found, self._key.seed_of_step(Stream.READING, step)

    def forget(self, before: int | None = None) -> None:
        """Drop what is kept of the draws: of the steps before one, or of all."""
        self._made = {} if before is None else {step: made for step, made in self._made.items() if step >= before}


def _pseudorandom(key: RandomKey, step: int, size: int, q: float) -> Indices:
    return poisson_sample(key.generator(Stream.SAMPLING, step), size, q)


def _exact(key: RandomKey, step: int, size: int, q: float) -> Indices:
    return exact_poisson_sample(Keystream.of(key, Stream.SAMPLING, step), size, q)


_DRAWN: dict[NoiseKind, Callable[[RandomKey, int, int, float], Indices]] = {
    "floating": _pseudorandom,
    "discrete": _exact,
}
"""How a draw is made beside each kind of noise: both from one cryptographic generator, or both from a fast one."""


def _pseudorandom_allocation(key: RandomKey, first: int, size: int) -> Callable[[int], Indices]:
    generator = key.generator(Stream.SAMPLING, first)
    return lambda block: allocation(generator, size, block)


def _exact_allocation(key: RandomKey, first: int, size: int) -> Callable[[int], Indices]:
    stream = Keystream.of(key, Stream.SAMPLING, first)
    return lambda block: exact_allocation(stream, size, block)


_ALLOCATED: dict[NoiseKind, Callable[[RandomKey, int, int], Callable[[int], Indices]]] = {
    "floating": _pseudorandom_allocation,
    "discrete": _exact_allocation,
}
"""How a block is allocated, in the same way."""
