"""Canaries: examples that are in the training set or not by a coin, put there without touching module or dataset."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_dp.lightning_internals import BEFORE_TRANSFER, TRANSFER, before_transfer, transfer
from lightning_dp.loading.like import loader_like
from lightning_dp.loading.reading import item
from lightning_dp.look.module import CANARIES
from lightning_dp.step.logs import split_output

NOT_A_CANARY = -1
OVERSHOOT = 1e3
"""A gradient-space canary's gradient before clipping, in units of 1: far above any clip norm in use."""


@dataclass(frozen=True)
class Canaries:
    """Which canaries are in, by independent fair coins.

    Args:
        gradient: membership of the gradient-space canaries, ``(m₁,)`` of bool.
        inputs: membership of the input-space canaries, ``(m₂,)`` of bool.
        sources: two dataset indices for each input-space canary, ``(m₂, 2)``: whose input, and whose target.
    """

    gradient: npt.NDArray[np.bool_]
    inputs: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int64]

    @classmethod
    def draw(cls, generator: np.random.Generator, gradient: int, inputs: int, dataset_size: int) -> Canaries:
        """Throw the coins."""
        return cls(
            gradient=generator.random(gradient) < 0.5,
            inputs=generator.random(inputs) < 0.5,
            sources=generator.integers(dataset_size, size=(inputs, 2)),
        )


class WithCanaries(Dataset[tuple[Any, int]]):
    """The user's dataset followed by the canaries that are in; each item says which gradient-space canary it is.

    A gradient-space canary carries the first example's tensors, which do not count in its loss. An input-space canary
    has one example's input and another example's target.
    """

    def __init__(self, dataset: Any, canaries: Canaries) -> None:
        self.dataset, self.canaries = dataset, canaries
        self._gradient, self._inputs = np.flatnonzero(canaries.gradient), np.flatnonzero(canaries.inputs)

    def __len__(self) -> int:
        return len(self.dataset) + len(self._gradient) + len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        place = index - len(self.dataset)
        if place < 0:
            return item(self.dataset, index), NOT_A_CANARY
        if place < len(self._gradient):
            return item(self.dataset, 0), int(self._gradient[place])
        return self.input_canary(int(self._inputs[place - len(self._gradient)])), NOT_A_CANARY

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


def let_in(module: pl.LightningModule, gradient: int, views: int = 1) -> None:
    """Teach ``module``, in place, to tell canaries from examples: its class becomes a subclass of itself.

    It gets one parameter with a coordinate for each gradient-space canary. A canary's loss is :data:`OVERSHOOT` times
    its own coordinate, so its gradient points along that coordinate alone and is clipped to norm C; an example's loss is
    the module's own, and its gradient is zero there. No optimizer holds the parameter, so it never moves.

    Args:
        module: to be changed.
        gradient: how many gradient-space canaries there are.
        views: K, how many rows training_step gets of one example. With any other number of rows it takes examples only,
            as when a few are looked at together before the first step, and raises ``ValueError`` if a canary is among
            them: a loss of several would not say whose it is.
    """
    module.add_module(CANARIES, nn.Embedding(max(gradient, 1), 1, _weight=torch.zeros(max(gradient, 1), 1)))
    module.__class__ = _audited(type(module), views)


def coordinates(module: pl.LightningModule) -> nn.Parameter:
    """The parameter whose coordinates the gradient-space canaries point along, ``(m₁, 1)``."""
    weight = module.get_submodule(CANARIES).weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _audited(user: type[pl.LightningModule], views: int) -> type[pl.LightningModule]:
    class Audited(user):  # type: ignore[misc,valid-type]  # the class is known when the module is
        """A user's module that tells canaries from examples."""

        @functools.wraps(user.training_step)
        def training_step(self, batch: tuple[Any, Tensor], *rest: Any) -> Any:
            inner, canary = batch
            if len(canary) != views and bool((canary < 0).all()):  # a look at whole batches, before the first step
                return super().training_step(inner, *rest)
            if len(canary) != views:
                raise ValueError(
                    f"{len(canary)} rows with a canary in an audit: expected one example, of {views}. Train without the audit."
                )
            loss, extras = split_output(super().training_step(inner, *rest))
            spike = OVERSHOOT * self.get_submodule(CANARIES)(canary.clamp(min=0)).mean()
            loss = torch.where((canary < 0).all(), loss, spike.to(loss.dtype))
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
