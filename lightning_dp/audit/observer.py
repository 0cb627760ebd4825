"""What an attacker sees of a run, and the scores made of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dp.audit.canaries import NOT_A_CANARY, WithCanaries, coordinates, put_under
from lightning_dp.audit.decorrelated import score, signal
from lightning_dp.audit.expected import Scores, log_likelihood_ratio, noise_on_a_canary
from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy
from lightning_dp.lightning_internals import before_transfer, transfer
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.step.logs import StepCapture


class Observer(pl.Callback):
    """Scores the canaries during a run: every released gradient (white box), and the losses of the end (black box).

    Args:
        private: the run's callback, for the plan.

    Attributes:
        white_box: after training, a score for each gradient-space canary, ``(m₁,)``: the log-likelihood ratio of all
            released gradients along its coordinate, with the canary against without it, if the plan is followed.
        signal: for each gradient-space canary, ``(m₁,)``, what was released along its coordinate, added up over the steps in
            units of its clipped gradient over the variance of the noise: near to a Gaussian, with and without the canary.
        black_box: a score for each input-space canary, ``(m₂,)``: by how much training lowered its loss.
    """

    def __init__(self, private: DifferentialPrivacy) -> None:
        self._private = private
        self.loader: DataLoader[Any] | None = None
        self.white_box: Scores = np.zeros(0)
        self.signal: Scores = np.zeros(0)
        self.black_box: Scores = np.zeros(0)
        self._rows: list[Scores] = []
        self._releases: list[tuple[Scores, Mechanism]] = []
        self._mechanism: Mechanism | None = None

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.automatic_optimization:
            put_under(trainer.optimizers, pl_module, self._private.public_optimizers or ())

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.white_box = np.zeros(coordinates(pl_module).numel())
        self.signal = np.zeros(coordinates(pl_module).numel())
        self.black_box = self._losses(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not pl_module.automatic_optimization and not _holds(optimizer, coordinates(pl_module)):
            return
        mechanism, gradient = self._private.released, coordinates(pl_module).grad
        assert mechanism is not None
        assert gradient is not None
        self._releases.append((gradient.detach().flatten().double().cpu().numpy(), mechanism))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if not self._releases:
            return
        released, self._mechanism = mean_of(self._releases)
        self._releases, mechanism = [], self._mechanism
        if mechanism.noise_std == 0:
            self.white_box += log_likelihood_ratio(released, mechanism)
            return
        in_units = released * mechanism.divisor / mechanism.clipping.clip_norm
        if mechanism.noise.correlation is not None:
            self._rows.append(in_units)
        else:
            self.white_box += log_likelihood_ratio(released, mechanism)
            self.signal += in_units / noise_on_a_canary(mechanism) ** 2

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.black_box = self.black_box - self._losses(trainer, pl_module)
        correlation = None if self._mechanism is None else self._mechanism.noise.correlation
        if self._mechanism is not None and correlation is not None and self._rows:
            sigma, q = self._mechanism.noise.noise_multiplier, self._mechanism.sampling.probability
            rows = np.array(self._rows)
            self.white_box += score(rows, correlation, sigma, q)
            self.signal += signal(rows, correlation)

    def _losses(self, trainer: pl.Trainer, module: pl.LightningModule) -> Scores:
        """The loss of each input-space canary, by the module's own training_step in eval mode."""
        assert self.loader is not None
        dataset, collate = self.loader.dataset, self.loader.collate_fn
        assert isinstance(dataset, WithCanaries)
        capture, modes, losses = StepCapture(module), [m.training for m in module.modules()], []
        module.eval()
        with torch.no_grad():
            for number in range(len(dataset.canaries.inputs)):
                batch = collate([(dataset.input_canary(number), NOT_A_CANARY)])
                batch = transfer(module, before_transfer(module, batch), trainer.strategy.root_device)
                with trainer.strategy.precision_plugin.train_step_context():
                    loss, _ = capture.run(functools.partial(module.training_step, batch, 0))
                losses.append(float(loss))
        for child, training in zip(module.modules(), modes, strict=True):
            child.training = training
        return np.asarray(losses, dtype=np.float64)


def mean_of(releases: Sequence[tuple[Scores, Mechanism]]) -> tuple[Scores, Mechanism]:
    """What the releases of one sample say together of a canary that is in each of them, and the noise on it.

    The m private optimizers of a step release one sample with noise of σ√m each. A canary's gradient is C in every one, so that
    the mean of those k that were made says all that they do, with noise of σ√m/√k: that of the plan, if none is left out.
    """
    mechanism = releases[-1][1]
    noise = mechanism.noise.noise_multiplier / math.sqrt(len(releases))
    return np.mean([released for released, _ in releases], axis=0), mechanism.but(noise_multiplier=noise)


def _holds(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter) -> bool:
    return any(one is parameter for group in optimizer.param_groups for one in group["params"])
