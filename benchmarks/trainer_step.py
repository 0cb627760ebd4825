"""The whole private step of a Trainer beside its engine alone, for ``benchmarks/engines.py``.

A Trainer trains with the callback. Between its steps the same micro-batches go through an engine of the same kind that
knows nothing of Lightning, so the two take turns on the same examples. A Trainer's step is everything from the end of one
batch's hooks to the end of the next: loader, transfer, capture of training_step, engine, noise, ledger, optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from clock import now
from engine_models import TASKS, loss_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.data import DataLoader, TensorDataset

from lightning_dp import DifferentialPrivacy
from lightning_dp.engines.select import EngineName, make_engine

CLIP_NORM = 1.0
MICRO_BATCHES = 4
"""Micro-batches in a step, on average. What is done once a step, the noise above all, is shared by them, as in training."""
WARM_UP = 2
"""Steps that are not counted: first touches of memory, kernels that choose themselves."""


class _Module(L.LightningModule):
    """One of the benchmark's models, trained in the plainest way."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The benchmark's loss, logged as modules do."""
        inputs, targets = batch
        loss = loss_of(self.net, inputs, targets)
        self.log("loss", loss, batch_size=1)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD without momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class _Turns(L.Callback):
    """Times each step, and then the engine alone on the same micro-batches."""

    def __init__(self, alone: Callable[[Any, int], Any], device: torch.device) -> None:
        self._alone, self._device = alone, device
        self._micro_batches: list[tuple[Any, int]] = []
        self._started = 0.0
        self.whole: list[float] = []
        self.engine: list[float] = []

    def on_train_start(self, *_: Any) -> None:
        """The first step begins; it chooses the engine."""
        self._started = now(self._device)

    def _note_micro_batches(self, strategy: Any) -> None:
        """From here on, note the micro-batches that the Trainer's engine is given."""
        engine = strategy.private_fit.step.run.selection.engine
        usual = engine.clipped_sum

        def noting(loss: Any, parameters: Any, batch: Any, examples: int, *args: Any, **options: Any) -> Any:
            self._micro_batches.append((batch, examples))
            return usual(loss, parameters, batch, examples, *args, **options)

        engine.clipped_sum = noting

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The step is over: it is the other's turn."""
        if not self.whole:
            self._note_micro_batches(trainer.strategy)
        self.whole.append(now(self._device) - self._started)
        started = now(self._device)
        for batch, examples in self._micro_batches:
            self._alone(batch, examples)
        self.engine.append(now(self._device) - started)
        self._micro_batches = []
        self._started = now(self._device)


def trainer_over_engine(
    name: str, size: int, views: int, engine: EngineName, steps: int, device: torch.device
) -> tuple[list[float], list[float]]:
    """Seconds of the Trainer's steps, and of the engine alone for the same examples.

    Args:
        name: name in ``engine_models.TASKS``.
        size: physical batch size; the expected one is ``MICRO_BATCHES`` times that.
        views: must be 1; views are made by a transform, which is the user's and not timed.
        engine: which engine.
        steps: how many are timed.
        device: where.
    """
    if views != 1:
        raise NotImplementedError("several views of an example")
    torch.manual_seed(0)
    net = TASKS[name].model().to(device)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}

    def loss_function(given: Any, batch: Any) -> tuple[Tensor, Any]:
        return loss_of(lambda x: functional_call(net, dict(given), (x,)), *batch), []

    own = make_engine(engine, net)
    turns = _Turns(lambda batch, count: own.clipped_sum(loss_function, parameters, batch, count, CLIP_NORM), device)
    privacy = DifferentialPrivacy(
        noise_multiplier=1.0, clip_norm=CLIP_NORM, engine=engine, physical_batch_size=size, seed=0
    )
    trainer = L.Trainer(
        accelerator=device.type, devices=1, max_steps=WARM_UP + steps, callbacks=[privacy, turns], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    batch_size = MICRO_BATCHES * size
    loader = DataLoader(TensorDataset(*TASKS[name].batch(8 * batch_size, views)), batch_size=batch_size)
    trainer.fit(_Module(net), loader)
    return turns.whole[WARM_UP:], turns.engine[WARM_UP:]


class _CountsOneStep:
    """Counts what happens between the ends of the last two optimizer steps: a whole step, with the loader.

    As a hook of all optimizers, and not of a callback, whose hooks a private step compares everything around.
    """

    def __init__(self, counting: Callable[[], Any]) -> None:
        self._counting, self._steps = counting, 0
        self.counts: Any = None

    def __call__(self, *_: Any) -> None:
        """Begin after the last but one, end after the last."""
        self._steps += 1
        if self._steps == WARM_UP:
            self._open = self._counting()
            self._open.__enter__()
        elif self._steps == WARM_UP + 1:
            self._open.__exit__(None, None, None)
            self.counts = self._open.counts


def counted_steps(name: str, size: int, counting: Callable[[], Any]) -> dict[str, Any]:
    """The counts of a whole step of a Trainer on all of a small data set, ``"private"`` and ``"plain"``.

    Args:
        name: name in ``engine_models.TASKS``.
        size: examples in each of the private step's two micro-batches.
        counting: makes a context whose ``counts`` say what was called in it.
    """
    found = {}
    for kind in ("plain", "private"):
        torch.manual_seed(0)
        one = _CountsOneStep(counting)
        privacy = DifferentialPrivacy(
            noise_multiplier=1.0, clip_norm=CLIP_NORM, engine="ghost", physical_batch_size=size, seed=0
        )
        trainer = L.Trainer(
            accelerator="cpu", devices=1, max_steps=WARM_UP + 1, callbacks=[privacy] * (kind == "private"),
            logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        data = TensorDataset(*TASKS[name].batch(2 * size, 1))
        hook = register_optimizer_step_post_hook(one)
        try:
            trainer.fit(_Module(TASKS[name].model()), DataLoader(data, batch_size=2 * size))
        finally:
            hook.remove()
        found[kind] = one.counts
    return found


def trained(name: str, size: int, private: bool, steps: int, after_a_step: Callable[..., None]) -> None:
    """Train on 64 batches of random examples, with one micro-batch in a step.

    Args:
        name: name in ``engine_models.TASKS``.
        size: the (expected) batch size.
        private: whether with the callback.
        steps: how many.
        after_a_step: is called behind each optimizer step.
    """
    torch.manual_seed(0)
    callbacks: list[Any] = [DifferentialPrivacy(noise_multiplier=1.0, clip_norm=CLIP_NORM, seed=0)] if private else []
    trainer = L.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = TensorDataset(*TASKS[name].batch(64 * size, 1))
    hook = register_optimizer_step_post_hook(after_a_step)
    try:
        trainer.fit(_Module(TASKS[name].model()), DataLoader(data, batch_size=size))
    finally:
        hook.remove()
