"""Random numbers in a pass over a micro-batch: each example's from a seed of its own, whatever draws them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dp.engines.decisions import part_ways
from lightning_dp.engines.random_operations import Arguments, arguments_of, calculated, draws_nothing, row_by_row
from lightning_dp.mechanism.memory import queued_to
from lightning_dp.mechanism.row_bits import keys_of_draw, mixed
from lightning_dp.mechanism.seeded_globals import torch_seeded


class FusedAttentionError(BaseException):
    """An attention kernel drops, and draws inside itself: the pass has to be made with the plain one."""


class RowDraws(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """While open, what torch draws is drawn for each example apart.

    It sees each operation below vmap, where the examples are the first axis of whatever is drawn. The numbers are a function of
    the example's seed and of a number that is taken from torch's global generator for each operation. So an example's numbers
    are the same in every engine, micro-batch and place; and activation checkpointing, which puts that generator back
    before it computes again, draws the same again.

    What is drawn after ``torch.manual_seed`` in the training step is torch's own, the same for every example, as is meant.

    Args:
        seeds: of the examples, ``(B,)`` int64.
        common: what torch's global generators were seeded with.

    Attributes:
        draws: how many numbers were taken from torch's global generator.
    """

    def __init__(self, seeds: Tensor, common: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.draws, self._common = 0, common
        self._seeds = mixed(seeds.clone())
        self._on = {seeds.device: self._seeds}
        self._permutations, self._keys = 0, seeds

    def open(self) -> AbstractContextManager[Any]:
        """Itself, to be entered."""
        return self

    def _dispatched(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not _is_random(func):
            return func(*args, **kwargs)
        given = arguments_of(func, args, kwargs)
        if draws_nothing(func, given):
            return func(*args, **kwargs)
        if "attention" in func.name():
            raise FusedAttentionError
        own = given.get("generator") not in (
            None,
            torch.default_generator,
        )  # of one example: the engine has parted several
        if own or torch.default_generator.initial_seed() != self._common:
            return self._one_by_one(func, args, kwargs)
        return self._drawn(func, given, args, kwargs)

    def _drawn(self, func: Any, given: Arguments, args: Any, kwargs: Any) -> Any:
        if "randperm" in func.name():
            return self._permuted(func, args, kwargs)
        found = calculated(func, given, self._keys_of_draw, len(self._seeds))
        if found is not NotImplemented:
            return found
        keys = self._keys_of_draw(self._seeds.device).tolist()

        def draw(row: int, args: Any, kwargs: Any) -> Any:
            with torch_seeded(keys[row]):
                return func(*args, **kwargs)

        if len(keys) == 1:
            return draw(0, args, kwargs)
        found = row_by_row(func, args, kwargs, len(keys), draw)
        return self._one_by_one(func, args, kwargs) if found is NotImplemented else found

    def _keys_of_draw(self, device: torch.device) -> Tensor:
        self.draws += 1
        if device not in self._on:
            self._on[device] = queued_to(self._seeds, device)
        return keys_of_draw(self._on[device], a_draw())

    def _permuted(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Vmap asks for a permutation once for each example, in their order."""
        row = self._permutations % len(self._seeds)
        self._permutations += 1
        if row == 0:
            self._keys = self._keys_of_draw(self._seeds.device)
        with torch_seeded(int(self._keys[row])):
            return func(*args, **kwargs)

    def _one_by_one(self, func: Any, args: Any, kwargs: Any) -> Any:
        if len(self._seeds) > 1:
            what = f"draws with {func.name()}, which is done for one example at a time,"
            part_ways([[place] for place in range(len(self._seeds))], what, single=True)
        return func(*args, **kwargs)


# Defined in the class, it would be wrapped for torch.compile, which takes several times as long. Nothing here is compiled.
RowDraws.__torch_dispatch__ = RowDraws._dispatched  # type: ignore[assignment, method-assign]  # see above


def a_draw() -> int:
    """63 bits of torch's global generator."""
    return int(torch.empty((), dtype=torch.int64).random_())


_random: dict[Any, bool] = {}


def _is_random(func: Any) -> bool:
    found = _random.get(func)
    if found is None:
        found = _random[func] = torch.Tag.nondeterministic_seeded in func.tags
    return found
