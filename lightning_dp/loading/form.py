"""A batch as the user has it and as the engines have it: what is put around the examples, and taken off again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from lightning_dp.batches.alike import Alike, put_together
from lightning_dp.batches.axis import BatchAxis, from_front, to_front
from lightning_dp.batches.containers import close_containers, open_containers, own_copy
from lightning_dp.batches.microbatch import Apart, BatchAxisError, Element, check_batch_axis, rows
from lightning_dp.batches.units import Units, group, ungroup
from lightning_dp.batches.views import Views
from lightning_dp.engines.user_code import no_end_of_the_data
from lightning_dp.lightning_internals import before_transfer, transfer
from lightning_dp.loading.examples import OneByOne
from lightning_dp.loading.own_generators import own_generators, put_back, reseed, seeded_as_torch_is
from lightning_dp.loading.row_wise import TRANSFER_HOOKS, is_written
from lightning_dp.loading.rows import check_all_came
from lightning_dp.mechanism.seeded_globals import globals_put_back, seed_globals


class Changes(Protocol):
    """What hooks at the start of a batch change in it, done to each example; see :mod:`lightning_dp.step.batch_hooks`."""

    @property
    def needed(self) -> bool:
        """Whether any hook changes its batch."""

    def applied(self, batch: Any) -> Any:
        """A batch of the engines, after each of its examples has been changed."""

    def alone(self, run: Callable[[], Any]) -> Any:
        """What ``run``, a batch transfer hook on one example, gives; what it leaves on module and data module is undone."""

    def applied_to_one(self, batch: Any) -> Any:
        """A batch of one example, as training_step takes it, after it has been changed."""


@dataclass(frozen=True, eq=False)
class ExampleForm:
    """How a batch comes from ``collate_fn`` to the engines, and each of its examples back to training_step.

    On the way there Lightning's transfer (precision, the user's hooks, the device), containers of the user's own in parts,
    examples on the first axis, what hooks change (:meth:`to_engine`), K views of each example (:meth:`with_views`), and the
    examples of a unit together (:meth:`in_units`). On the way back all but the transfer, in the opposite order
    (:meth:`to_user`).

    Guarantee:
        Every step but the user's own hooks and transform treats examples one by one.

    Attributes:
        module: attached to its Trainer. Its ``on_before_batch_transfer``, ``transfer_batch_to_device`` and
            ``on_after_batch_transfer`` (or the data module's), and its Trainer's precision, are used.
        device: where the engines work.
        axis: where a batch has its examples, see :mod:`lightning_dp.batches.axis`.
        views: how the K views of an example are made, or ``None`` for the examples as they are.
        units: whose each example is, or ``None`` where each is a unit of its own.
        hooks: what hooks at the start of a batch change in it, or ``None`` as long as nobody knows.
        row_wise: what the user vouches for, see :mod:`lightning_dp.loading.row_wise`.
    """

    module: pl.LightningModule
    device: torch.device
    axis: BatchAxis = 0
    views: Views | None = None
    units: Units | None = None
    hooks: Changes | None = None
    row_wise: tuple[str, ...] = ()

    def groups(
        self, batch: Any, units: int, each: int, seeds: Callable[[], list[int]], common: Callable[[], int]
    ) -> Iterator[Alike]:
        """A micro-batch of a step on the device, as the engines take it: in groups of examples that are alike.

        Hooks of the user's see one example (or unit) at a time, with all generators seeded for it, unless they are vouched
        for. Those see many at once, with generators that are seeded for the step.

        Args:
            batch: of the private loader.
            units: how many examples (or units) it is of.
            each: how many examples each has.
            seeds: 64 bits for each of the units, by which its hooks draw.
            common: 64 bits for the step, by which hooks draw that are vouched for.

        Raises:
            DroppedExamplesError: some examples are missing.
        """
        given = batch.groups if isinstance(batch, OneByOne) else [Alike(batch, list(range(units)))]
        written = self.written_hooks()
        alone = any(name not in self.row_wise for name in written)
        for alike in given:
            if isinstance(alike.batch, Apart):
                with self._drawing() as seed:
                    apart = Alike(self._apart(alike.batch, seed, seeds()), alike.places)
                yield apart
                continue
            if alone:
                with self._drawing() as seed:
                    ones = self._one_by_one(alike, each, seed, seeds())
                yield from _of(put_together(ones, each, self.axis), alike)
                continue
            with self._drawing() if written else nullcontext(_nothing) as seed:
                if written:
                    seed(common())
                opened = self.opened(self._moved(alike.batch))
            check_all_came(opened, len(alike.places) * each)
            if self.hooks is None or not self.hooks.needed:
                yield Alike(opened, alike.places)
                continue
            check_batch_axis(opened, len(alike.places) * each)
            own, ones = seeds(), []
            with self._drawing() as seed:
                for place, number in enumerate(alike.places):
                    seed(own[number])
                    ones.append(self.hooks.applied(rows(opened, place * each, each)))
            yield from _of(put_together(ones, each, self.axis), alike)

    def _owners(self) -> list[Any]:
        """Whose hooks a batch goes through."""
        trainer: Any = self.module.trainer
        return [self.module, getattr(trainer, "datamodule", None), *trainer.callbacks]

    @contextmanager
    def _drawing(self) -> Iterator[Callable[[int], None]]:
        """Gives what seeds all that hooks draw from, and puts it back when it closes."""
        own = own_generators(*self._owners())

        def seed(number: int) -> None:
            seed_globals(number, self.device)
            if own:
                reseed(own, number)

        with globals_put_back(self.device), put_back(own):
            yield seed

    def _one_by_one(self, alike: Alike, each: int, seed: Callable[[int], None], seeds: list[int]) -> list[Any]:
        batch, ones = alike.batch, []
        if not any(
            name in _ON_THE_WAY for name in self.written_hooks()
        ):  # Lightning moves all that is sent as it is; so it goes at once
            batch = move_data_to_device(batch, self.device)
        opened = self.opened(batch)
        check_all_came(opened, len(alike.places) * each)
        check_batch_axis(opened, len(alike.places) * each)
        for place, number in enumerate(alike.places):
            one = self.closed(rows(opened, place * each, each))
            seed(seeds[number])
            moved = self.opened(self._moved_alone(one))
            ones.append(moved if self.hooks is None else self.hooks.applied(moved))
        return ones

    def _apart(self, batch: Apart, seed: Callable[[int], None], seeds: list[int]) -> Apart:
        found = []
        for element, own in zip(batch.elements, seeds, strict=True):
            seed(own)
            one = self._moved_alone(element.content)
            found.append(Element(one if self.hooks is None else self.hooks.applied_to_one(one)))
        return Apart(found)

    def written_hooks(self) -> list[str]:
        """The batch transfer hooks that are the user's own; see :func:`lightning_dp.loading.row_wise.is_written`."""
        owners = [self.module, getattr(self.module.trainer, "datamodule", None)]
        return [
            name for name in TRANSFER_HOOKS if any(is_written(name, owner) for owner in owners if owner is not None)
        ]

    def to_engine(self, batch: Any, drawn: int | None = None) -> Any:
        """A collated batch on the device, as the engines take it, its hooks run at once: for looks, see :meth:`groups`.

        Generators that hooks hold draw what follows from torch's seed.

        Args:
            batch: of ``collate_fn``, or of the engines after :meth:`closed`.
            drawn: how many examples it is of, if that is to be checked.

        Raises:
            DroppedExamplesError: some of them are missing.
        """
        with seeded_as_torch_is(*self._owners()):
            if isinstance(batch, Apart):
                moved = [self._moved(element.content) for element in batch.elements]
                return Apart([Element(one if self.hooks is None else self.hooks.applied_to_one(one)) for one in moved])
            batch = self.opened(self._moved(batch))
            if drawn is not None:
                check_all_came(batch, drawn)
            return batch if self.hooks is None else self.hooks.applied(batch)

    def with_views(self, batch: Any, indices: npt.NDArray[np.int64], seed: int) -> Any:
        """``(B, ...)`` with its K views, ``(B, K, ...)``; as it is where none are wanted.

        Args:
            batch: on the device.
            indices: dataset indices of its examples, on which their views depend.
            seed: on which they depend too.
        """
        return batch if self.views is None else self.views.drawn(batch, indices, seed)

    def in_units(self, batch: Any, units: int, each: int) -> Any:
        """The examples of each unit together, see :func:`lightning_dp.batches.units.group`."""
        return group(batch, units, each)

    def to_user(self, example: Any) -> Any:
        """One example (its views, a unit's examples) as the ordinary batch that training_step takes."""
        example = ungroup(example)
        return self.closed(example if self.views is None else self.views.fold(example))

    def opened(self, batch: Any, *, strict: bool = True) -> Any:
        """A batch with its containers in parts and its examples on the first axis.

        Args:
            batch: any nest, on any device.
            strict: whether every field that the axis names has to be there.
        """
        return to_front(open_containers(batch), self.axis, strict=strict)

    def closed(self, batch: Any) -> Any:
        """The inverse of :meth:`opened`, for a batch of any number of examples, of which no views were made."""
        if isinstance(batch, Apart):
            if len(batch.elements) != 1:
                raise BatchAxisError(
                    f"{len(batch.elements)} examples that were collated one by one: expected one. They cannot be put together "
                    "to a batch."
                )
            return own_copy(batch.elements[0].content)
        return close_containers(from_front(batch, self.axis))

    def with_one_view(self) -> ExampleForm:
        """The same with one view of each example, where there are any."""
        return self if self.views is None else replace(self, views=replace(self.views, k=1))

    def _moved_alone(self, one: Any) -> Any:
        return self._moved(one) if self.hooks is None else self.hooks.alone(lambda: self._moved(one))

    def _moved(self, batch: Any) -> Any:
        """A batch after what Lightning does to it between loader and training_step."""
        batch = self.module.trainer.precision_plugin.convert_input(batch)
        with no_end_of_the_data("a batch transfer hook"):
            return transfer(self.module, before_transfer(self.module, batch), self.device)


_ON_THE_WAY = ("on_before_batch_transfer", "transfer_batch_to_device")


def _nothing(seed: int) -> None:
    """Nothing draws."""


def _of(found: list[Alike], within: Alike) -> Iterator[Alike]:
    """Groups of a group, by the places that its examples have in the micro-batch."""
    for one in found:
        yield Alike(one.batch, [within.places[place] for place in one.places])
