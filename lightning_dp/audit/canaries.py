"""Canaries: examples that are in the training set or not by a coin, put there without touching module or dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp.batches.units import Units
from lightning_dp.lightning_internals import BEFORE_TRANSFER, TRANSFER, before_transfer, transfer
from lightning_dp.loading.like import loader_like
from lightning_dp.loading.reading import item
from lightning_dp.look.module import CANARIES
from lightning_dp.step.logs import split_output

NOT_A_CANARY = 0
"""Beside an example; gradient-space canaries are counted from 1. A batch of zeros has no canary in it."""
OVERSHOOT = 1e3
"""A gradient-space canary's gradient before clipping, in units of 1: far above any clip norm in use."""


@dataclass(frozen=True)
class Canaries:
    """Which canaries are in, by independent fair coins.

    Args:
        gradient: membership of the gradient-space canaries, ``(m₁,)`` of bool.
        inputs: membership of the input-space canaries, ``(m₂,)`` of bool.
        sources: two dataset indices for each input-space canary, ``(m₂, 2)``: whose input, and whose target.
        each: how many examples a gradient-space canary has: more than one where users are protected.
    """

    gradient: npt.NDArray[np.bool_]
    inputs: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int64]
    each: int = 1

    @classmethod
    def draw(
        cls, generator: np.random.Generator, gradient: int, inputs: int, dataset_size: int, each: int = 1
    ) -> Canaries:
        """Throw the coins, one for each canary and none for anything else."""
        return cls(
            gradient=generator.random(gradient) < 0.5,
            inputs=generator.random(inputs) < 0.5,
            sources=generator.integers(dataset_size, size=(inputs, 2)),
            each=each,
        )


class WithCanaries(Dataset[tuple[Any, int]]):
    """The user's dataset followed by the canaries that are in; each item says which gradient-space canary it is.

    A gradient-space canary carries the first example's tensors, which do not count in its loss. An input-space canary
    has one example's input and another example's target.
    """

    def __init__(self, dataset: Any, canaries: Canaries) -> None:
        self.dataset, self.canaries = dataset, canaries
        self._gradient = np.repeat(np.flatnonzero(canaries.gradient), canaries.each)
        self._inputs = np.flatnonzero(canaries.inputs)

    def __len__(self) -> int:
        return len(self.dataset) + len(self._gradient) + len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = index - len(self.dataset)
        if place < 0:
            return item(self.dataset, index), NOT_A_CANARY
        if place < len(self._gradient):
            return item(self.dataset, 0), int(self._gradient[place]) + 1
        return self.input_canary(int(self._inputs[place - len(self._gradient)])), NOT_A_CANARY

    def users(self, units: Units) -> list[int]:
        """Whose each item is, if the dataset's are ``units``: every canary is a user of its own, with all its examples."""
        own = np.empty(len(self.dataset), dtype=np.int64)
        own[units.order] = np.repeat(np.arange(len(units)), np.diff(units.starts))
        canaries = len(units) + np.concatenate([self._gradient, len(self.canaries.gradient) + self._inputs])
        return [int(user) for user in np.concatenate([own, canaries])]

    def input_canary(self, number: int) -> Any:
        """The input-space canary of this number, in or out."""
        first, second = (item(self.dataset, int(index)) for index in self.canaries.sources[number])
        if isinstance(first, (tuple, list)) and len(first) > 1:
            return type(first)([*first[:-1], second[-1]])
        return first


class CollateBeside:
    """The user's collate_fn on the user's items, and the canary numbers beside them."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Sequence[tuple[Any, int]]) -> tuple[Any, Tensor]:
        """The user's batch, and the canaries' numbers, ``(B,)``."""
        return self.collate([item for item, _ in items]), torch.tensor([canary for _, canary in items])


def loader_with_canaries(loader: DataLoader[Any], canaries: Canaries) -> DataLoader[Any]:
    """A loader over the dataset with its canaries; everything but dataset, collate_fn and shuffling is the user's.

    Also its length, since an audited run takes as many steps in an epoch as the run that it stands for.
    """
    together, collate = WithCanaries(loader.dataset, canaries), CollateBeside(loader.collate_fn)
    return loader_like(loader, together, len(loader), shuffle=True, collate_fn=collate)


def let_in(module: pl.LightningModule, gradient: int, rows: int | None = 1) -> None:
    """Teach ``module``, in place, to tell canaries from examples: its class becomes a subclass of itself.

    It gets one parameter with a coordinate for each gradient-space canary. A canary's loss is :data:`OVERSHOOT` times
    its own coordinate, so its gradient points along that coordinate alone and is clipped to norm C; an example's loss is
    the module's own, and its gradient is zero there. No optimizer holds the parameter, so it never moves; under manual
    optimization the private ones have to (:func:`put_under`), and moving it changes no gradient.

    Args:
        module: to be changed.
        gradient: how many gradient-space canaries there are.
        rows: how many rows training_step gets of one example: one, or its K views; ``None`` if any number of rows may be one
            unit's, as a user's. With any other number it takes examples only, as when a few are looked at together before
            the first step, and raises ``ValueError`` if a canary is among them: a loss of several would not say whose it is.
    """
    module.add_module(CANARIES, nn.Embedding(max(gradient, 1), 1, _weight=torch.zeros(max(gradient, 1), 1)))
    module.__class__ = _audited(type(module), rows)


def put_under(optimizers: Sequence[torch.optim.Optimizer], module: pl.LightningModule, public: Sequence[int]) -> None:
    """Let every private optimizer hold the canaries' coordinates: manual optimization finds gradients for what is held."""
    for place, optimizer in enumerate(optimizers):
        if place not in public:
            optimizer.param_groups[0]["params"].append(coordinates(module))


def coordinates(module: pl.LightningModule) -> nn.Parameter:
    """The parameter whose coordinates the gradient-space canaries point along, ``(m₁, 1)``."""
    weight = module.get_submodule(CANARIES).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _audited(user: type[pl.LightningModule], rows: int | None) -> type[pl.LightningModule]:
    class Audited(user):  # type: ignore[misc,valid-type]  # the class is known when the module is
        """A user's module that tells canaries from examples."""

        @functools.wraps(user.training_step)
        def training_step(self, batch: tuple[Any, Tensor], *rest: Any) -> Any:
            inner, canary = batch
            several = rows is not None and len(canary) != rows
            if several and bool((canary == NOT_A_CANARY).all()):  # a look at whole batches, before the first step
                return super().training_step(inner, *rest)
            if several:
                raise ValueError(
                    f"{len(canary)} rows with a canary in an audit: expected one example, of {rows}. Train without the audit."
                )
            if not self.automatic_optimization:
                with _losses_of(self, canary):
                    return super().training_step(inner, *rest)
            loss, extras = split_output(super().training_step(inner, *rest))
            loss = _or_spike(self, canary, loss)
            return {"loss": loss, **extras} if extras else loss

    def before(self: Any, batch: tuple[Any, Tensor], dataloader_idx: int = 0) -> Any:
        inner, canary = batch
        return before_transfer(super(Audited, self), inner, dataloader_idx), canary

    def moved(self: Any, batch: tuple[Any, Tensor], device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        inner, canary = batch
        there = transfer(super(Audited, self), inner, device, dataloader_idx)
        return there, canary if device is None else canary.to(device)

    setattr(Audited, BEFORE_TRANSFER, before)
    setattr(Audited, TRANSFER, moved)
    Audited.__name__ = f"Audited{user.__name__}"
    Audited.__qualname__ = Audited.__name__
    return Audited


def _or_spike(module: Any, canary: Tensor, loss: Tensor) -> Tensor:
    """An example's own loss, or a canary's."""
    spike = OVERSHOOT * module.get_submodule(CANARIES)((canary - 1).clamp(min=0)).mean()
    return torch.where((canary == NOT_A_CANARY).all(), loss, spike.to(loss.dtype))


@contextmanager
def _losses_of(module: Any, canary: Tensor) -> Iterator[None]:
    """While open, what training_step gives to ``manual_backward`` is the loss of a canary where the batch is one."""
    given, own = module.manual_backward, module.__dict__.get("manual_backward")
    module.__dict__["manual_backward"] = lambda loss, *args, **options: given(
        _or_spike(module, canary, loss), *args, **options
    )
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["manual_backward"]
        else:
            module.__dict__["manual_backward"] = own
