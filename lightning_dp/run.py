"""One fit, from what is asked for to its first step: plan, then look. All that is decided before step 0 is decided here."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_dp.batches.views import Views
from lightning_dp.engines.protocol import LossFunction
from lightning_dp.engines.select import Selection
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import has_no_loader_yet
from lightning_dp.loading.columns import with_batch_size
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.loader import LogicalBatch, PoissonLoader
from lightning_dp.loading.repeated_reads import check_reads
from lightning_dp.loading.transfer import let_logical_batches_through, stop_letting_through
from lightning_dp.look.agreed import Agreed, agree, check_still_agreed
from lightning_dp.look.autotune import autotuned
from lightning_dp.look.batch_size.memory import measures_by_default
from lightning_dp.look.batch_size.physical import default_physical_batch_size, settle_physical_batch_size
from lightning_dp.look.choose_engine import engine_for, loss_of_training_step, manual_objective
from lightning_dp.look.dry_run import early_dry_run, late_dry_run
from lightning_dp.look.engine_check import CHECKED_EXAMPLES
from lightning_dp.look.engine_check_in_shards import select_in_shards
from lightning_dp.look.epochs import Progress, planned_steps
from lightning_dp.look.layerwise_check import start_layerwise
from lightning_dp.look.leaks.examples_apart import check_examples_stay_apart
from lightning_dp.look.loader import check_loader, check_not_nested
from lightning_dp.look.looked_at import looked_at
from lightning_dp.look.planning import check_blocks, stretch_of, warn_spent
from lightning_dp.look.same_data import check_same_data_on_every_rank
from lightning_dp.look.trainer import check_trainer
from lightning_dp.mechanism.trainable import trainable
from lightning_dp.ranks.agreement import check_same_parameters_on_every_rank
from lightning_dp.ranks.gathering import on_every_rank
from lightning_dp.ranks.layerwise import Layerwise
from lightning_dp.ranks.sharding import full_parameters
from lightning_dp.ranks.shared_key import shared_key
from lightning_dp.ranks.world import world_of
from lightning_dp.record.account import Account
from lightning_dp.record.pace import Pace
from lightning_dp.settings import Settings
from lightning_dp.step.batch_hooks import BatchHooks
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.manual.script import Script
from lightning_dp.step.objective import AutomaticObjective, Objective
from lightning_dp.step.open_step import OpenStep, Replay
from lightning_dp.step.planned import Planned, Run
from lightning_dp.step.private_step import PrivateStep
from lightning_dp.step.tally import Tally
from lightning_dp.step.two_points import GHOST
from lightning_dp.step.user_hooks import UserHooks
from lightning_dp.step.without_data import WithoutData


class Fit:
    """One ``trainer.fit`` under differential privacy.

    Lightning asks in this order: :meth:`set_up` → :meth:`process_dataloader` (the plan) → :meth:`before_step` (before the
    first: the look) → :attr:`step`. What was planned and what was found are frozen; another loader, or parameters that are
    thawed, replace them.

    Args:
        asked: holds the arguments of ``DifferentialPrivacy`` as attributes of the same names, and its ``replay``.
        account: what is spent, and how it is written down.
        trainer: whose fit begins.
        views: how the K augmented views of each example are made, or ``None`` for the examples as they are.

    Attributes:
        tally: counts over the steps.
    """

    def __init__(self, asked: Any, account: Account, trainer: pl.Trainer, views: Views | None) -> None:
        self.tally = Tally(filtered=account.filtered)
        self._asked, self._account, self._trainer, self._views = asked, account, trainer, views
        self._at_start = Progress.of(trainer)
        self._agreed: Agreed | None = None
        self._planned: Planned | None = None
        self._script: Script | None = None
        self._step: PrivateStep | None = None
        self._looked_at: dict[frozenset[str], PrivateStep] = {}
        self._user_hooks: UserHooks | None = None
        self._pace = Pace()

    @property
    def step(self) -> PrivateStep:
        """The private step.

        Raises:
            RuntimeError: nothing was looked at yet.
        """
        if self._step is None:
            raise RuntimeError("a private step before on_train_batch_start: expected Trainer.fit to call it first.")
        return self._step

    @property
    def planned(self) -> Planned | None:
        """What is known since the training loader is; ``None`` before."""
        return self._planned

    def shown_to_hooks(self, sample: LogicalBatch) -> Any:
        """What hooks and callbacks get for the batch of a step: a placeholder without anybody's data."""
        return sample if self._planned is None else self._planned.hooks.shown(sample)

    def goes_on_from(self, checkpoint: dict[str, Any]) -> None:
        """The fit resumes this checkpoint."""
        self._at_start = Progress.in_checkpoint(checkpoint)

    def set_up(self) -> None:
        """Plan, calibrate and refuse before the first (validation) batch."""
        self._trainer.fit_loop.setup_data()
        if self._planned is not None:  # with limit_train_batches=0 nothing will be trained
            let_logical_batches_through(self._planned.module)
            check_not_nested(self._trainer.train_dataloader, self._planned.loader)

    def process_dataloader(self, dataloader: object) -> PoissonLoader:
        """Replace the user's training loader by one of Poisson-sampled logical batches. The plan is made here.

        Raises:
            PreflightError: the loader cannot be sampled by Poisson, or there are several of them.
            ValueError: a privacy number is out of range.
        """
        trainer, module, settings = self._trainer, self._trainer.lightning_module, Settings.of(self._asked)
        world, before = world_of(trainer.strategy), self._planned
        loader = on_every_rank(world, lambda: check_loader(with_batch_size(dataloader)), PreflightError)
        on_every_rank(world, lambda: check_reads(loader, settings.privacy.row_wise), PreflightError)
        if before is not None and has_no_loader_yet(trainer):
            raise PreflightError(
                "several training loaders: expected exactly one. Each would need a budget of its own; join the datasets "
                "with torch.utils.data.ConcatDataset."
            )
        logs = StepCapture(module) if before is None else before.logs
        form = ExampleForm(
            module, world.device, settings.data.batch_axis, self._views, row_wise=settings.privacy.row_wise
        )
        if not module.automatic_optimization and before is None:
            public, size = settings.privacy.public_optimizers, settings.speed.physical_batch_size
            self._script = early_dry_run(module, logs, form, loader, public, size)
        unit = settings.privacy.privacy_unit
        units = None if unit is None else on_every_rank(world, lambda: unit.read(loader.dataset), PreflightError)
        remaining = planned_steps(trainer, len(loader), self._at_start, self._steps_in_a_batch)
        if self._agreed is None:
            self._agreed = agree(settings, self._account, trainer, world, loader, units, remaining)
            self._account.plan(self._agreed.ledger, self._agreed.report, world.size)
            self.tally.unused_samples = self._account.unused_samples  # a resumed run goes on behind them
            self.tally.carried = self._account.carried
        else:  # reload_dataloaders_every_n_epochs
            check_still_agreed(settings, self._agreed, self._account, module, world, loader, units, remaining)
        ledger = self._agreed.ledger
        if before is not None:
            key = before.key
        elif self._replay is not None:
            key = self._replay.key
        else:
            key = shared_key(world, settings.privacy.seed, ledger.changed)
        if before is None:
            ledger.begins(stretch_of(ledger, key.digest(), loader.dataset))
            check_blocks(ledger)
        most = 1 if units is None else units.most
        size = settings.speed.physical_batch_size
        if before is not None and self._step is not None:
            size = before.loader.physical_batch_size  # as it was settled
        elif not isinstance(size, int):
            size = default_physical_batch_size(
                module, ledger.plan, world, self._views.total if self._views else 1, most
            )
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
            next_step=partial(self.tally.next_step, ledger),
            units=units,
            row_wise=settings.privacy.row_wise,
            begun_at=ledger.begun_at + self.tally.unused_samples,
        )
        if self._replay is not None:
            private.leave_out(self._replay.left_out, self._replay.unread)
        form = replace(form, units=units)
        hooks = BatchHooks(form, logs, private)
        private.form = form = replace(form, hooks=hooks)
        logs.loader = private
        self._planned = planned = Planned(module, world, form, private, ledger, key, logs, hooks, loader)
        if self._step is not None:  # a loader of later epochs
            with full_parameters(module, world):
                check_examples_stay_apart(planned, partial(self._step.objective.losses, planned))
            run = replace(self._step.run, planned=planned)
            self._step = self._private_step(run, self._step.objective)
            self._looked_at = {run.trainable: self._step}
        return private

    def before_step(self) -> None:
        """Look before the first step, after all hooks that may set what training_step reads; and again where parameters thaw.

        Raises:
            PreflightError: training cannot be private as it is set up.
            EngineError: the engine asked for cannot run this training_step.
        """
        check_trainer(self._trainer)  # a callback may have changed it since the start
        if self._planned is None or self._agreed is None:
            raise RuntimeError("a private step without a plan: expected Trainer.fit to read the training loader first.")
        names = frozenset(trainable(self._planned.module))
        if self._step is None:
            self._step = self._looked_at[names] = self._begin(self._planned, self._agreed)
        elif self._step.run.trainable != names:
            if names not in self._looked_at:
                self._looked_at[names] = self._look_again(self._planned)
            self._step = self._looked_at[names]

    def end_step(self) -> dict[str, float]:
        """Take note of a step that is over, and give the ``dp/...`` metrics of it."""
        trainer, agreed = self._trainer, self._agreed
        if agreed is None or self._planned is None:
            return {}
        waited = self._planned.loader.waited if self.step.run.log_train_metrics else None
        self._account.samples_unused(self.tally.unused_samples)
        self.carry_on()
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where type checkers do not see it
        metrics = agreed.report.metrics(every, waited, self.tally.released)
        agreed.report.tell_if_more_is_allowed(trainer)
        if self.step.run.log_train_metrics and agreed.ledger.plan.steps is not None:
            self._pace.step(agreed.ledger.plan.steps - agreed.ledger.steps)
        return metrics

    def carry_on(self) -> None:
        """Have the account hold what the mechanism carries by now."""
        if self._agreed is not None:
            self._account.carried = self.tally.carried

    def stop_if_spent(self) -> None:
        """Stop before a step that would overspend, unless the Trainer is about to end by itself."""
        trainer, agreed, planned = self._trainer, self._agreed, self._planned
        if agreed is None or planned is None or agreed.ledger.can_charge() or trainer.should_stop:
            return
        ends_at = planned_steps(trainer, len(planned.loader), self._at_start, self._steps_in_a_batch)
        if ends_at is not None and agreed.ledger.steps - agreed.steps_before >= ends_at:
            return
        trainer.should_stop = True
        warn_spent(agreed.ledger.plan.target_epsilon, agreed.ledger.plan.delta, agreed.ledger.steps)

    def end(self) -> None:
        """The fit is over. Where there was no step left to take, its record is begun with its end."""
        if self._agreed is not None and self._step is None:
            self._account.open(self._trainer, self._agreed.ledger, self._agreed.report, self._agreed.facts)

    def teardown(self) -> None:
        """Leave the module as it was found, and close what reads the data."""
        if self._user_hooks is not None:
            self._user_hooks.rest()
        if self._planned is not None:
            self._planned.loader.close()
            stop_letting_through(self._planned.module)

    @property
    def _replay(self) -> Replay | None:
        """What is set from outside, if this is the replay of a run; from the time on when the loader is known."""
        found: Replay | None = self._asked.replay
        return found

    @property
    def _steps_in_a_batch(self) -> int:
        """The fewest optimizer steps in a batch: 1 under automatic optimization."""
        return 1 if self._script is None else self._script.fewest_steps

    def _begin(self, planned: Planned, agreed: Agreed) -> PrivateStep:
        """The look, and from here on every step is written down before it is released. A collective call."""
        speed, module, world = Settings.of(self._asked).speed, planned.module, planned.world
        check_same_parameters_on_every_rank(world, module)
        make_loss = partial(loss_of_training_step, planned)
        selection = select_in_shards(planned, speed.engine, make_loss)
        settled = speed.physical_batch_size is None and not measures_by_default(world)
        most = CHECKED_EXAMPLES  # where more may be found to fit
        if settled or isinstance(speed.physical_batch_size, int):
            most = planned.loader.physical_batch_size
        with full_parameters(module, world):
            objective, selection, loss_function = self._chosen(planned, most, selection)
            settle_physical_batch_size(planned, speed.physical_batch_size, selection.engine, loss_function)
        with full_parameters(module, world):
            company = check_examples_stay_apart(planned, partial(objective.losses, planned))
        seen = selection.facts() | {"checked": looked_at(planned, selection, most, company)}
        layers = start_layerwise(planned, selection, make_loss)
        journal = self._account.open(self._trainer, agreed.ledger, agreed.report, agreed.facts)
        size = planned.loader.physical_batch_size
        agreed.report.start(self._trainer, selection.engine.name, size, journal, seen)
        self._user_hooks = UserHooks(planned.logs, Settings.of(self._asked).privacy.public_state)
        self._user_hooks.watch()
        return self._private_step(self._run(planned, selection, layers), objective)

    def _look_again(self, planned: Planned) -> PrivateStep:
        """Parameters were thawed or frozen on the way, as by BackboneFinetuning. A collective call."""
        module, world = planned.module, planned.world
        check_same_parameters_on_every_rank(world, module)
        with full_parameters(module, world):
            objective, selection, _ = self._chosen(planned, planned.loader.physical_batch_size, None)
        layers = start_layerwise(planned, selection, partial(loss_of_training_step, planned))
        run = self._run(planned, selection, layers)
        rank_zero_info(f"{selection.describe()}\n  (tried again: {len(run.trainable)} parameters are trained now)")
        return self._private_step(run, objective)

    def _chosen(
        self, planned: Planned, most: int, selection: Selection | None
    ) -> tuple[Objective, Selection, LossFunction]:
        """What a step trains and by which engine, and a loss to measure with.

        Args:
            planned: of whose first examples engines are tried.
            most: how many examples a micro-batch may have.
            selection: the engine, if it is chosen already.
        """
        settings, module = Settings.of(self._asked), planned.module
        if module.automatic_optimization:
            rule = planned.ledger.plan.mechanism.filter
            loss_function = loss_of_training_step(planned, rule=rule)
            cannot = {} if rule is None else {"ghost": GHOST}
            selection = selection or engine_for(planned, settings.speed.engine, most, loss_function, cannot=cannot)
            wanted = settings.measures and self._replay is None
            selection = autotuned(planned, selection, loss_function, wanted, settings.speed.engine)
            return AutomaticObjective(WithoutData(planned), rule), selection, loss_function
        public, size = settings.privacy.public_optimizers, settings.speed.physical_batch_size
        form, given = planned.form, planned.given
        self._script = script = late_dry_run(self._script, module, planned.logs, form, given, public, size)
        return manual_objective(planned, script, settings.speed.engine, most)

    def _private_step(self, run: Run, objective: Objective) -> PrivateStep:
        return PrivateStep(run, objective, self.tally, OpenStep if self._replay is None else self._replay.open_step)

    def _run(self, planned: Planned, selection: Selection, layers: Layerwise | None) -> Run:
        settings = Settings.of(self._asked)
        return Run(
            planned,
            selection,
            layers,
            frozenset(trainable(planned.module)),
            static_shapes=settings.speed.static_shapes,
            log_train_metrics=settings.data.log_train_metrics,
        )
