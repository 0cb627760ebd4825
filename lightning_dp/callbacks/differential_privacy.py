"""The line: a callback that makes ``trainer.fit`` differentially private and says what was spent."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_dp.accounting import Ledger, Statement
from lightning_dp.accounting.find_plan import Wanted
from lightning_dp.batches.axis import Axis
from lightning_dp.batches.units import Units
from lightning_dp.callbacks.augmentation import views_of
from lightning_dp.engines.select import EngineName, Selection
from lightning_dp.errors import PreflightError
from lightning_dp.look.advice import check_decisions
from lightning_dp.look.batch_size.physical import PhysicalBatchSize
from lightning_dp.look.epochs import Progress, check_draws_in_an_epoch, check_end_was_given, planned_steps
from lightning_dp.look.module import check_module, check_optimizers
from lightning_dp.look.planning import (
    agreed_plan,
    check_batch_after_resume,
    check_delta_for,
    check_plan_stays,
    warn_spent,
)
from lightning_dp.look.privacy_unit import unit_from
from lightning_dp.look.public_optimizers import check_places, check_public_optimizers
from lightning_dp.look.trainer import check_before_setup
from lightning_dp.mechanism.complex import coordinates
from lightning_dp.mechanism.secure import resolution
from lightning_dp.plan.clipping import DEFAULT_GAMMA, Clipping, ClippingStyle
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.plan.simulation import as_if_real, simulated
from lightning_dp.private_step import PrivateStep
from lightning_dp.ranks.agreement import check_same_on_every_rank, facts
from lightning_dp.ranks.gathering import on_every_rank, on_rank_zero
from lightning_dp.ranks.world import World, world_of
from lightning_dp.record.checkpoint import (
    Spent,
    lost_since,
    of_a_copy,
    read_with_digest,
    spent_of,
    with_digest,
    with_lost_steps,
)
from lightning_dp.record.course import facts_of
from lightning_dp.record.journal import Journal
from lightning_dp.record.lost_steps import Places, caveats, places
from lightning_dp.record.report import Report
from lightning_dp.record.spawned import ToParent, forget, from_child, in_a_child, register
from lightning_dp.record.witness import Witness
from lightning_dp.settings import check_arguments
from lightning_dp.strategy import make_private


class DifferentialPrivacy(pl.Callback):
    """Train with DP-SGD: Poisson sampling, per-example clipping, Gaussian noise, and a ledger of what was spent.

    Add it to ``Trainer(callbacks=[...])``; the module, the data and the optimizer stay as they are. One Lightning batch
    becomes one private step, so ``max_steps``, ``global_step`` and schedulers count private steps, and an epoch has
    ``len(train_dataloader)`` of them, as without privacy.

    Give exactly one of ``epsilon`` and ``noise_multiplier``. With ``epsilon`` the smallest noise that keeps the planned
    number of steps (``max_steps`` or ``max_epochs`` of the Trainer) within (ε, δ) is found, and training stops rather
    than overspend. With ``noise_multiplier`` ε is computed and grows with every step.

    All arguments are public and are written to logs and checkpoints.

    Args:
        epsilon: the ε that must not be exceeded.
        noise_multiplier: σ, the noise's standard deviation in units of ``clip_norm``. 0 trains without privacy.
        delta: δ, well below 1 / dataset_size.
        clip_norm: C, the L2 norm each example's gradient is clipped to.
        clipping: ``"flat"``, ``"per_layer"`` (each of L layers to C/√L) or ``"automatic"`` (g·C/(‖g‖+γ)). One example moves
            the sum by at most C under each of them.
        automatic_gamma: γ of ``"automatic"``.
        expected_batch_size: B over all ranks; ``None`` for the loader's ``batch_size`` × number of ranks.
        dataset_size: N, a public number of examples; ``None`` for ``len(dataset)``.
        physical_batch_size: the most examples that are worked on at once; ``None`` chooses by rule of thumb, ``"auto"``
            measures before training what fits and is fast. Changes memory and speed, never the result.
        max_batch_size: M, the most examples in a step over all ranks: a larger draw is cut to a random part of that size,
            and a part of δ pays for it (see :mod:`lightning_dp.accounting.slack`). ``None`` never cuts.
        engine: ``"auto"``, ``"ghost"``, ``"vmap"`` or ``"loop"``: how per-example gradients are computed.
        seed: ``None`` (the default) takes sampling and noise from 256 secret bits of the operating system, which no
            ``seed_everything`` fixes. A number makes them reproducible, for tests, and the statement says so.
        simulate: S above 1 makes a *simulation*, with none of the privacy: batch and noise are divided by S, at the same
            number of steps (see :mod:`lightning_dp.plan.simulation`). For choosing settings where that is allowed; ``epsilon``
            is then the budget of the run that is simulated, and what is spent is said.
        secure: ``True`` draws noise and samples from a cryptographic generator, adds gradients up as integers, and adds exact
            discrete Gaussian noise (Canonne, Kamath and Steinke 2020); needs the extra ``lightning-dp[secure]``, and is slow.
        log_train_metrics: ``False`` keeps what ``training_step`` logs from the loggers: those numbers are computed from
            private examples without noise.
        public_optimizers: under manual optimization, places in ``configure_optimizers`` of the optimizers that see no
            private data, such as a GAN's generator: neither clipped nor charged, and given zeros for a batch. All others
            are private.
        static_shapes: ``True`` pads every micro-batch to ``physical_batch_size`` with rows that count in nothing, so that
            shapes do not vary with the draw. Changes speed, never the result.
        batch_axis: the axis of the batch's tensors on which the examples are, 0 for the first; or by field, as in
            ``{"inputs": 1, "positions": None}``, where ``None`` marks a part that all examples share. It enters every
            example's gradient and must be public: the same whatever the examples are. ``"list"`` is for lists with one
            element for each example, as of images that differ in size. ``"each"`` calls ``collate_fn`` for every example
            alone, whatever it makes: slow, and always right.
        privacy_unit: who is protected, if one person has several examples: the field with the user (``"user_id"``), a file,
            or the users themselves. Users are then drawn, and counted in ``expected_batch_size`` and ``dataset_size``.
        max_examples_per_unit: the most examples of a user in a step, chosen at random; ``None`` for 32.

    Raises:
        ValueError: a number is out of range, or not exactly one of ``epsilon`` and ``noise_multiplier`` is given.
        PreflightError: while ``fit`` is being set up, if module, data or Trainer cannot be trained privately.
        BudgetExceededError: if a step would overspend although training could not be stopped (``min_steps``).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_steps=875, callbacks=[DifferentialPrivacy(epsilon=8.0, delta=1e-5)], logger=False)

    Source: Abadi et al. 2016, Algorithm 1 (arXiv 1607.00133); De, Berrada, Hayes, Smith, Balle 2022 (arXiv 2204.13650).
    """

    def __init__(
        self,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        delta: float = 1e-5,
        clip_norm: float = 1.0,
        clipping: ClippingStyle = "flat",
        automatic_gamma: float = DEFAULT_GAMMA,
        expected_batch_size: int | None = None,
        dataset_size: int | None = None,
        physical_batch_size: PhysicalBatchSize = None,
        max_batch_size: int | None = None,
        engine: EngineName = "auto",
        seed: int | None = None,
        simulate: int = 1,
        secure: bool = False,
        log_train_metrics: bool = True,
        public_optimizers: list[int] | None = None,
        static_shapes: bool = False,
        batch_axis: Axis | Literal["each"] | dict[str, Axis | None] = 0,
        privacy_unit: str | list[Any] | dict[int, Any] | None = None,
        max_examples_per_unit: int | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self.clip_norm = clip_norm
        self.clipping: ClippingStyle = clipping
        self.automatic_gamma = automatic_gamma
        self.expected_batch_size = expected_batch_size
        self.dataset_size = dataset_size
        self.physical_batch_size = physical_batch_size
        self.max_batch_size = max_batch_size
        self.engine: EngineName = engine
        self.seed = seed
        self.simulate = simulate
        self.secure = secure
        self.log_train_metrics = log_train_metrics
        self.batch_axis = batch_axis
        self.static_shapes = static_shapes
        check_arguments(self)
        self.public_optimizers = check_places(public_optimizers)
        self.privacy_unit = unit_from(privacy_unit, max_examples_per_unit, static_shapes)
        self._ledger: Ledger | None = None
        self._report: Report | None = None
        self._spent: Spent | None = None
        self._journal: Journal | None = None
        self._world_size: int | None = None
        self._at_start = Progress()
        self._planned, self._begun, self._facts, self._steps_at_start, self._unused_samples = False, False, "", 0, 0
        self._sigma: float | None = None  # of the run simulated, if it is a simulation
        self._address = register(self)
        self._to_parent: ToParent | None = None
        self._at_home, self._heard = True, b""

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes on from all that is spent; what a fit holds open stays with the original."""
        spent = self._now()
        return {**self.__dict__, "_spent": spent, "_journal": None, "_to_parent": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        address = register(self, self._address)
        self._spent = self._spent if address == self._address else of_a_copy(self._spent)  # not in a child
        self._address = address

    @property
    def ledger(self) -> Ledger | None:
        """What is spent, once the training data are known; also by processes that the Trainer started (``ddp_spawn``, …)."""
        self._hear()
        return self._ledger

    def _hear(self, trainer: pl.Trainer | None = None) -> None:
        """Take over what children have spent, if they have told anything since; given the Trainer, write it down too."""
        news = from_child(self._address, self._heard) if self._at_home else None
        if news is not None:
            self._heard, self._spent, self._journal, self._report = news.raw, news.spent, None, news.report
            self._ledger, self._world_size = news.report.ledger, news.spent.world_size
            self._unused_samples = news.spent.unused_samples
            if trainer is not None and news.spent.lineage is not None:
                news.report.write_for_child(trainer, news.spent.lineage.counted)

    @property
    def plan(self) -> PrivacyPlan | None:
        """The plan in force, once the training data are known."""
        return None if self.ledger is None else self.ledger.plan

    def statement(self) -> Statement:
        """What has been spent so far, as a statement that can be published.

        Raises:
            RuntimeError: training has not been set up yet.
        """
        self._hear()
        if self._report is not None:
            return self._report.statement()
        raise RuntimeError("statement() before fit: expected a run whose data are known. Call trainer.fit first.")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        world = world_of(trainer.strategy)
        on_every_rank(world, lambda: check_before_setup(trainer, pl_module), PreflightError)
        check_same_on_every_rank(world, facts(self, trainer, world))
        strategy = make_private(trainer.strategy)
        self._spent = self._now()
        self._at_home = not in_a_child(trainer)
        if self._at_home:
            forget(self._address)
        self._at_start = Progress.of(trainer)
        self._planned = self._begun = False
        strategy.private_step = PrivateStep(
            pl_module,
            world,
            lambda loader, units: self._plan(trainer, world, loader, units),
            seed=self.seed,
            engine=self.engine,
            physical_batch_size=self.physical_batch_size,
            log_train_metrics=self.log_train_metrics,
            static_shapes=self.static_shapes,
            views=views_of(trainer),
            public_optimizers=self.public_optimizers,
            batch_axis=self.batch_axis,
            unit=self.privacy_unit,
            begin=lambda selection: self._begin(trainer, selection),
        )

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_module(pl_module)  # again: configure_model may have added the layers
        check_optimizers(pl_module, trainer.optimizers)
        check_public_optimizers(pl_module, trainer.optimizers, self.public_optimizers)
        check_decisions(trainer, pl_module)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._set_up(trainer)

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:  # only now is the checkpoint's ledger known
            self._set_up(trainer)
        self._stop_if_spent(trainer)

    def _set_up(self, trainer: pl.Trainer) -> None:
        trainer.fit_loop.setup_data()  # plans, calibrates and refuses before the first (validation) batch
        step = make_private(trainer.strategy).private_step if self._planned else None
        if step is not None:  # with limit_train_batches=0 nothing will be trained
            step.check_data()

    def _begin(self, trainer: pl.Trainer, selection: Selection | None = None) -> None:
        """From here on every step is written down before it is released; an engine was tried, if there is any step."""
        assert self._ledger is not None
        assert self._report is not None
        self._begun = True
        self._report.open(trainer)
        if trainer.is_global_zero:
            before = self._spent.lineage if self._spent else None
            self._journal = Journal(self._report.folder, self._ledger.numbers, before, self._facts)
        if in_a_child(trainer) and trainer.local_rank == 0:
            now = self._now()
            assert now is not None
            self._to_parent = ToParent(self._address, self._report, now, self._journal)
        self._ledger.witness = Witness(self._report, self._journal, self._to_parent)
        step = make_private(trainer.strategy).private_step
        if step is not None and selection is not None:
            self._report.start(trainer, step, selection, self._journal)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        assert self._report is not None
        step = make_private(trainer.strategy).private_step
        self._unused_samples = 0 if step is None else step.unused_samples
        waited = None if step is None else step.waited
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set where type checkers do not see it
        for name, value in self._report.metrics(every, waited).items():
            pl_module.log(name, value, prog_bar=name == "dp/epsilon", batch_size=1)
        self._report.tell_if_more_is_allowed(trainer)
        if self._to_parent is not None:
            self._to_parent.unused(self._unused_samples)
        self._stop_if_spent(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._report is not None:
            step = make_private(trainer.strategy).private_step
            self._report.write(trainer, self._journal, "ended", broken=0 if step is None else step.not_finite)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._report is not None:
            if self._planned and not self._begun:  # there was no step left to take
                self._begin(trainer)
            self._report.write(trainer, self._journal, "ended")
            rank_zero_info(str(self._report.statement()))
        if self._journal is not None and self.ledger is not None:
            planned = self.ledger.plan.steps
            self._journal.close(ended=planned is not None and self.ledger.steps >= planned)
        if self._to_parent is not None:
            self._to_parent.close()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._hear(trainer)
            if self._report is not None:  # what was released is spent, however it ended
                self._report.write(trainer, self._journal, "interrupted")
        for written in (self._journal, self._to_parent):
            if written is not None:
                written.close()

    @override
    def state_dict(self) -> dict[str, Any]:
        spent = self._now()
        return {} if spent is None else with_digest(spent)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._spent = read_with_digest(state_dict) if state_dict else None
        self._unused_samples = 0 if self._spent is None else self._spent.unused_samples

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        on_every_rank(world_of(trainer.strategy), lambda: spent_of(checkpoint, self.state_key), PreflightError)
        self._at_start = Progress.in_checkpoint(checkpoint)

    def _plan(self, trainer: pl.Trainer, world: World, loader: DataLoader[Any], units: Units | None) -> Ledger:
        where = Places() if self._planned else places(trainer, trainer.ckpt_path)
        if not self._planned:
            self._facts = facts = "" if self.seed is None else facts_of(trainer, self.automatic_gamma, self.batch_axis)
            lost = on_rank_zero(world, lambda: lost_since(self._spent, where, facts))
            self._spent = None if self._spent is None else with_lost_steps(self._spent, lost)
        spent = None if self._spent is None else self._spent.ledger
        wanted = Wanted(
            epsilon=self.epsilon,
            noise_multiplier=self._sigma if self._planned else self.noise_multiplier,
            delta=self.delta,
            clipping=Clipping(self.clip_norm, self.clipping, self.automatic_gamma),
            expected_batch_size=self.expected_batch_size,
            dataset_size=self.dataset_size,
            max_batch_size=self.max_batch_size,
            resolution=resolution(self.secure),
            coordinates=coordinates(trainer.lightning_module.parameters()) if self.secure else None,
        )
        remaining = self._planned_steps(trainer, len(loader))
        plan = agreed_plan(world, loader, units, wanted, as_if_real(spent, self.simulate), remaining)
        real, sigma, plan = plan, plan.noise_multiplier, simulated(plan, self.simulate)
        if self._planned and self.ledger is not None:  # reload_dataloaders_every_n_epochs
            check_plan_stays(self.ledger.plan, plan)
            return self.ledger
        check_delta_for(plan)
        check_draws_in_an_epoch(trainer, real, loader)
        check_end_was_given(trainer, plan)
        check_batch_after_resume(
            plan, spent, self.expected_batch_size, self._spent.world_size if self._spent else None, trainer.world_size
        )
        self._world_size = trainer.world_size
        ledger = self._ledger = Ledger(plan) if spent is None else Ledger.resume(plan, spent)
        self._steps_at_start = ledger.steps
        lineage = self._spent.lineage if self._spent else None
        ledger.course = lineage.course if lineage else ""
        notes = on_rank_zero(world, lambda: caveats(lineage, ledger.numbers, where, self.seed is not None))
        self._report = Report(ledger, "secret" if self.seed is None else "reproducible", notes)
        step = make_private(trainer.strategy).private_step
        if step is not None:
            step.unused_samples = self._unused_samples  # a resumed run goes on behind them
        self._planned, self._sigma = True, sigma
        return ledger

    def _planned_steps(self, trainer: pl.Trainer, per_epoch: int) -> int | None:
        step = make_private(trainer.strategy).private_step
        per_batch = 1 if step is None else step.optimizer_steps_per_batch
        return planned_steps(trainer, per_epoch, self._at_start, per_batch)

    def _now(self) -> Spent | None:
        """What this and all earlier fits have spent so far, for a checkpoint or the next fit."""
        if self.ledger is None:
            return self._spent
        before = None if self._spent is None else self._spent.lineage
        lineage = before if self._journal is None else self._journal.lineage
        return Spent(self.ledger.state_dict(), lineage, self._world_size, self._unused_samples)

    def _stop_if_spent(self, trainer: pl.Trainer) -> None:
        """Stop before a step that would overspend, unless the Trainer is about to end by itself."""
        assert self.ledger is not None
        if self.ledger.can_charge() or trainer.should_stop:
            return
        planned = self._planned_steps(trainer, len(trainer.train_dataloader))  # type: ignore[arg-type]  # it is the private loader
        if planned is not None and self.ledger.steps - self._steps_at_start >= planned:
            return
        trainer.should_stop = True
        warn_spent(self.epsilon, self.delta, self.ledger.steps)
