"""The private step inside Lightning: what both private strategies delegate to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_dp.accounting import Ledger
from lightning_dp.batches.axis import BatchAxis
from lightning_dp.batches.units import Units
from lightning_dp.batches.views import Views
from lightning_dp.engines.accumulate import Accumulated, accumulate
from lightning_dp.engines.fall_back import FallBack
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import EngineName, Selection
from lightning_dp.errors import PreflightError
from lightning_dp.layers.batch_norm import check_batch_norms_rest
from lightning_dp.lightning_internals import has_no_loader_yet
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.loader import PoissonLoader, check_sample
from lightning_dp.loading.transfer import let_logical_batches_through, stop_letting_through
from lightning_dp.look.batch_size.physical import (
    PhysicalBatchSize,
    default_physical_batch_size,
    settle_physical_batch_size,
)
from lightning_dp.look.engine_check import CHECKED_EXAMPLES, WithoutData, check_engines
from lightning_dp.look.engine_check_in_shards import select_in_shards
from lightning_dp.look.layerwise_check import start_layerwise
from lightning_dp.look.leaks.examples_apart import check_examples_stay_apart, of_training_step
from lightning_dp.look.loader import check_loader, check_not_nested
from lightning_dp.look.privacy_unit import PrivacyUnit, read_units
from lightning_dp.look.same_data import check_same_data_on_every_rank
from lightning_dp.look.trainer import check_trainer
from lightning_dp.manual_optimization import ManualOptimization
from lightning_dp.mechanism.complex import as_complex_like, as_real_pairs
from lightning_dp.mechanism.randomness import Stream
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.ranks.agreement import check_same_parameters_on_every_rank
from lightning_dp.ranks.gathering import on_every_rank
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.sharding import full_parameters, reshard
from lightning_dp.ranks.shared_key import shared_key
from lightning_dp.ranks.world import World
from lightning_dp.step.batch_hooks import BatchHooks
from lightning_dp.step.contents import Contents, check_nothing_written, tensors_of
from lightning_dp.step.forked_rng import forked_rng
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.step_sample import StepSample
from lightning_dp.step.never_moved import NeverMoved
from lightning_dp.step.parameter_hooks import put_gradient
from lightning_dp.step.planned import Planned
from lightning_dp.step.sample_release import release_sample
from lightning_dp.step.spectral import SpectralNorms
from lightning_dp.step.undone import undone
from lightning_dp.step.user_loss import example_loss, takes_batch_idx

Planner = Callable[[DataLoader[Any], Units | None], Ledger]
"""From the user's training loader, and whose each example is, to the ledger of the run, which holds the plan."""


class PrivateStep:
    """From a logical batch to a noisy gradient in ``p.grad``, in the order in which Lightning asks for it.

    :meth:`process_dataloader` → :meth:`check_data` → before the first step, when all hooks have prepared the module,
    :meth:`choose_engine` → for each step :meth:`training_step`, then :meth:`backward`.
    The step itself is :mod:`lightning_dp.engines.accumulate`; this class only feeds it and carries its result home.

    Args:
        module: to be trained.
        world: the processes that train it.
        planner: makes the plan when the training loader is known; called again if Lightning reloads it.
        seed: ``None`` for secret randomness, a number for a reproducible run.
        engine: name of the engine, see :data:`lightning_dp.engines.select.EngineName`.
        physical_batch_size: the most examples in a micro-batch, ``"auto"`` to have that measured in
            :meth:`choose_engine`, or ``None`` for a size by rule of thumb.
        log_train_metrics: whether what training_step logs reaches the loggers.
        static_shapes: whether every micro-batch is padded to the physical batch size.
        views: how the K augmented views of each example are made, or ``None`` for the examples as they are.
        public_optimizers: under manual optimization, places of the optimizers that see no private data.
        batch_axis: where a batch has its examples, see :mod:`lightning_dp.batches.axis`.
        unit: who is protected, if not each example alone.
        begin: called once the engine is chosen, before the first step.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        world: World,
        planner: Planner,
        *,
        seed: int | None = None,
        engine: EngineName = "auto",
        physical_batch_size: PhysicalBatchSize = None,
        log_train_metrics: bool = True,
        static_shapes: bool = False,
        views: Views | None = None,
        public_optimizers: Sequence[int] = (),
        batch_axis: BatchAxis = 0,
        unit: PrivacyUnit | None = None,
        begin: Callable[[Selection], None] = lambda _: None,
    ) -> None:
        self.module, self.world = module, world
        self._form = ExampleForm(module, world.device, batch_axis, views)
        self.batch_hooks: BatchHooks | None = None
        self._begin = begin
        self._unit = unit
        self._public_optimizers = public_optimizers
        self._manual: ManualOptimization | None = None
        self.unused_samples, self.optimizer_steps_per_batch = 0, 1
        self._planner = planner
        self._seed = seed
        self._engine_name: EngineName = engine
        self._physical_batch_size = physical_batch_size
        self._log_train_metrics = log_train_metrics
        self._static_shapes = static_shapes
        self._planned: Planned | None = None
        self._selection: Selection | None = None
        self._layers: Layerwise | None = None
        self._never_moved = NeverMoved()
        self._capture = StepCapture(module)
        self._pending: Accumulated | None = None
        self._tried: set[str] = set()
        self.not_finite = 0

    @property
    def planned(self) -> Planned:
        """What is known since the training loader is.

        Raises:
            RuntimeError: it is not yet, or the fit has ended.
        """
        if self._planned is None:
            raise RuntimeError("a private step without a training loader: expected one before the first step.")
        return self._planned

    def process_dataloader(self, dataloader: object) -> PoissonLoader:
        """Replace the user's training loader by one of Poisson-sampled logical batches.

        Raises:
            PreflightError: the loader cannot be sampled by Poisson, or there are several of them.
        """
        module, world, before = self.module, self.world, self._planned
        loader = on_every_rank(world, lambda: check_loader(dataloader), PreflightError)
        if before is not None and has_no_loader_yet(module.trainer):
            raise PreflightError(
                "several training loaders: expected exactly one. Each would need a budget of its own; join the datasets "
                "with torch.utils.data.ConcatDataset."
            )
        if not module.automatic_optimization and self._manual is None:
            self._manual = ManualOptimization(world, self._form, self._capture, self._public_optimizers)
            size = self._physical_batch_size
            self.optimizer_steps_per_batch = self._manual.rehearse_early(self._form, loader, size)
        units = read_units(world, self._unit, loader.dataset)
        form = replace(self._form, units=units)
        ledger = self._planner(loader, units)
        key = shared_key(world, self._seed, ledger.changed) if before is None else before.key
        views, most = 1 if form.views is None else form.views.k, 1 if units is None else units.most
        size = self._physical_batch_size
        if not isinstance(size, int):
            size = default_physical_batch_size(module, ledger.plan, world, views, most)
        check_same_data_on_every_rank(world, loader.dataset)
        if before is not None:
            before.loader.close()
        private = PoissonLoader(
            loader,
            ledger.plan,
            key,
            rank=world.rank,
            world_size=world.size,
            physical_batch_size=size,
            next_step=lambda: ledger.steps + self.unused_samples,
            units=units,
        )
        self.batch_hooks = BatchHooks(form, self._capture, private)
        private.form = form = replace(form, hooks=self.batch_hooks)
        self._planned = Planned(module, world, form, private, ledger, key)
        if self._selection is not None:  # a loader of later epochs
            self._check_examples_stay_apart()
        return private

    def check_data(self) -> None:
        """Refuse a nested loader before the first hook or validation batch."""
        let_logical_batches_through(self.module)
        loader = None if self._planned is None else self._planned.loader
        check_not_nested(self.module.trainer.train_dataloader, loader)

    def on_train_batch_start(self) -> None:
        """Choose an engine before the first step, after all hooks that may set what training_step reads; on every rank."""
        if self._selection is None:
            self._begin(self.choose_engine())

    def choose_engine(self) -> Selection:
        """Try engines on two examples, or refuse, and keep the one to train with. Nothing of it is kept or released."""
        module, world, planned = self.module, self.world, self.planned
        check_same_parameters_on_every_rank(world, module)
        make_loss = partial(self._loss_function, (0,) if takes_batch_idx(module) else ())
        self._selection = select_in_shards(planned, self._engine_name, make_loss)
        with full_parameters(module, world):
            if self._manual is not None:
                steps = self._manual.rehearse_late(planned.form, self.optimizer_steps_per_batch)
                self.optimizer_steps_per_batch = steps
                self._selection, loss_function = self._manual.choose_engines(self.try_engines)
            else:
                loss_function = make_loss({})
                self._selection = self._selection or self.try_engines(loss_function, trainable(module))
            rank_zero_info(self._selection.describe())
            self._physical_batch_size = settle_physical_batch_size(
                planned, self._physical_batch_size, self._selection.engine, loss_function
            )
        self._check_examples_stay_apart()
        self._without_data = WithoutData(planned)
        self._tried = set(trainable(module))
        self._layers = start_layerwise(planned, self._selection, make_loss)
        return self._selection

    def _check_examples_stay_apart(self) -> None:
        losses = of_training_step(self.module, self._capture) if self._manual is None else self._manual.losses
        with full_parameters(self.module, self.world):
            check_examples_stay_apart(self.planned, losses)

    def training_step(self, batch: Any, *rest: Any) -> STEP_OUTPUT:
        """Sum this rank's clipped per-example gradients over the logical batch; keep them for :meth:`backward`.

        Returns:
            What the user's training_step would return for the whole batch: the mean loss, detached, or a dict with it.
            With no example on this rank the loss is 0.
        """
        planned, module, world, capture = self.planned, self.module, self.world, self._capture
        assert self._selection is not None
        batch = batch if self.batch_hooks is None else self.batch_hooks.sample_behind(batch)
        check_sample(batch, planned.ledger.steps, self.unused_samples)
        check_trainer(module.trainer)  # a callback may have changed it since the start
        some_rank_is_empty = 0 < batch.global_size < world.size
        share = world.broadcast if some_rank_is_empty else None
        if self._manual is not None:
            seed = planned.key.torch_seed(Stream.DROPOUT, batch.step, world.rank, 1)
            sample = StepSample(
                micro_batches=lambda: planned.micro_batches(batch),
                sum_clipped=partial(self.clipped_sum, batch.step),
                release=partial(self.released, batch.step),
                try_engines=self.try_engines,
                forked_rng=lambda: forked_rng(world.device, seed),
            )
            output: STEP_OUTPUT = self._manual.training_step(sample, rest, share, self._log_train_metrics)
            self.unused_samples += not sample.charged
            capture.say_once_that_logs_are_private(self._log_train_metrics)
            return output
        SpectralNorms(module).advance()
        parameters, loss_function = trainable(module), self._loss_function(rest)
        if parameters.keys() != self._tried:  # thawed or frozen on the way, as by BackboneFinetuning
            check_same_parameters_on_every_rank(world, module)
            with full_parameters(module, world):
                self._selection = self.try_engines(loss_function, trainable(module))
            self._tried = set(parameters)
            self._layers = start_layerwise(planned, self._selection, partial(self._loss_function, rest))
            rank_zero_info(
                f"{self._selection.describe()}\n  (tried again: {len(parameters)} parameters are trained now)"
            )
        given: Mapping[str, Tensor] = trainable(module)
        if self._layers is not None:
            given, fixed = self._layers.begin(batch.step)
            loss_function = self._loss_function(rest, fixed)
        total = self.clipped_sum(batch.step, self._selection, loss_function, given, planned.micro_batches(batch))
        self._pending = total
        alone = partial(self._without_data, loss_function, as_real_pairs(given))
        extras = capture.replay(total.outputs, total.examples, share, log=self._log_train_metrics, without_data=alone)
        capture.say_once_that_logs_are_private(self._log_train_metrics)
        loss = torch.cat(total.losses).mean() if total.losses else torch.zeros((), device=world.device)
        return {"loss": loss, **extras} if extras else loss

    def clipped_sum(
        self,
        step: int,
        selection: Selection,
        loss_function: LossFunction,
        parameters: Mapping[str, Tensor],
        micro_batches: Iterable[tuple[Any, int]],
    ) -> Accumulated:
        """The sum of the clipped gradients of this rank's part of a step's sample. Nothing of it may be released."""
        planned, module, world = self.planned, self.module, self.world
        plan = planned.ledger.plan
        check_batch_norms_rest(module)
        before = Contents.of(tensors_of(module))
        with forked_rng(world.device, planned.key.torch_seed(Stream.DROPOUT, step, world.rank)):
            total = accumulate(
                FallBack(selection, module, (PreflightError,), partial(undone, module)),
                loss_function,
                as_real_pairs(parameters),
                micro_batches,
                plan.clipping_rule,
                pad_to=planned.loader.physical_batch_size if self._static_shapes else None,
                apart=() if self._layers is None else self._layers.names,
            )
            if self._layers is not None:
                self._layers.finish()
        check_nothing_written(module, before)
        self.not_finite += total.not_finite
        self._never_moved.look(total.gradient, total.examples)
        return total

    def released(
        self, step: int, gradient: Mapping[str, Tensor], *, part: int = 0, parts: int = 1
    ) -> dict[str, Tensor]:
        """Charge for a sample at its first release, and give the noisy gradient that may be used and published.

        Args:
            step: the sample's number.
            gradient: this rank's sum of clipped gradients.
            part: the release's number among those of the sample, from 0.
            parts: how many the sample makes at most. The noise is √parts as large, so that together they cost one.

        Raises:
            BudgetExceededError: the step would overspend the target ε. Nothing is released.
            RankLostError: another rank is gone. The step is charged, and nothing of it is used.
        """
        ledger, key = self.planned.ledger, self.planned.key
        return release_sample(
            self.world, self.module, gradient, ledger, key, step, layers=self._layers, part=part, parts=parts
        )

    def backward(self, closure_loss: Tensor, **options: Any) -> Tensor:
        """Charge the ledger, release the noisy gradient, and put it into ``p.grad`` of the trainable parameters.

        Raises:
            BudgetExceededError: the step would overspend the target ε. Nothing is released.
        """
        if self._manual is not None:
            return self._manual.backward(closure_loss, **options)
        total, self._pending = self._pending, None
        if total is None:
            raise RuntimeError(
                "backward without a private training_step: expected one training_step for each backward. "
                "Use automatic optimization and an optimizer that calls its closure once per step."
            )
        module, strategy = self.module, self.module.trainer.strategy
        strategy.pre_backward(closure_loss)
        strategy.precision_plugin.pre_backward(closure_loss, module)
        reshard(module)  # a hook that called the module has left a part of it whole
        gradient = self.released(self.planned.ledger.steps + self.unused_samples, total.gradient)
        for name, parameter in trainable(module).items():
            put_gradient(parameter, as_complex_like(gradient[name], parameter))
        closure_loss = strategy.precision_plugin.post_backward(closure_loss, module)
        strategy.post_backward(closure_loss)
        return closure_loss

    def step_closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure of an optimizer's step; under manual optimization it also brings that step's gradient."""
        return closure if self._manual is None else self._manual.step_closure(optimizer, closure)

    def try_engines(self, loss_function: LossFunction, parameters: Mapping[str, nn.Parameter]) -> Selection:
        """The engine for one loss, tried on the first examples."""
        loader = self.planned.loader
        most = CHECKED_EXAMPLES if self._physical_batch_size == "auto" else loader.physical_batch_size
        return check_engines(self.planned, self._engine_name, loss_function, parameters, most)

    def teardown(self) -> None:
        """Forget the key and leave the module as it was found."""
        planned, self._planned, self._pending = self._planned, None, None
        if planned is not None:
            planned.loader.close()
        stop_letting_through(self.module)

    @property
    def randomness(self) -> Literal["secret", "reproducible"]:
        """Where sampling and noise come from."""
        return "secret" if self._seed is None else "reproducible"

    @property
    def waited(self) -> float | None:
        """Seconds for which the steps so far have waited for data, if numbers that depend on the draws may be logged."""
        return self._planned.loader.waited if self._planned is not None and self._log_train_metrics else None

    @property
    def physical_batch_size(self) -> int | None:
        """The most examples in a micro-batch, once the loader is known."""
        return None if self._planned is None else self._planned.loader.physical_batch_size

    def _loss_function(self, rest: Any, fixed: Mapping[str, Tensor] | None = None) -> LossFunction:
        return example_loss(self.planned.form, self._capture, rest, fixed=fixed)
