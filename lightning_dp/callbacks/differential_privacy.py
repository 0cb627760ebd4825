"""The line: a callback that makes ``trainer.fit`` differentially private and says what was spent."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_dp.accounting import Ledger, Statement
from lightning_dp.batches.axis import Axis
from lightning_dp.callbacks.augmentation import views_of
from lightning_dp.callbacks.other_names import answered
from lightning_dp.engines.select import EngineName
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import Callback, logged_again
from lightning_dp.loading.privacy_unit import unit_from
from lightning_dp.loading.row_wise import check_row_wise
from lightning_dp.look.advice import advise_optimizers, check_decisions
from lightning_dp.look.filtered import check_filter
from lightning_dp.look.module import check_module, check_optimizers
from lightning_dp.look.public_optimizers import check_public_optimizers
from lightning_dp.look.trainer import check_before_setup
from lightning_dp.mechanism.filtering import KEY
from lightning_dp.plan.clipping import DEFAULT_GAMMA, ClippingStyle
from lightning_dp.plan.correlation import DEFAULT_BANDS, NoiseStyle
from lightning_dp.plan.filtering import DEFAULT_GAIN, DEFAULT_LOOKAHEAD, FilterStyle
from lightning_dp.plan.mechanism import ADD_REMOVE, Adjacency, Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.plan.sampling import SamplingScheme
from lightning_dp.ranks.agreement import check_same_on_every_rank, facts
from lightning_dp.ranks.gathering import on_every_rank
from lightning_dp.ranks.world import world_of
from lightning_dp.record.account import Account
from lightning_dp.record.checkpoint import read_with_digest, spent_of, with_digest
from lightning_dp.run import Fit
from lightning_dp.settings import PhysicalBatchSize, Settings, check_places, check_public_state
from lightning_dp.step.open_step import Replay
from lightning_dp.strategy import make_private, register_strategies


class DifferentialPrivacy(Callback):
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
        clip_norm: C, the L2 norm each example's gradient is clipped to; with ``"quantile"`` and ``"slaclip"`` at first.
        clipping: ``"flat"``, ``"per_layer"`` (each of L layers to C/√L) or ``"automatic"`` (g·C/(‖g‖+γ)), with a fixed C; or
            ``"quantile"`` or ``"slaclip"``, which adapt C from step to step (:mod:`lightning_dp.plan.adaptation`). One
            example moves the sum of gradients by at most C under each of them.
        automatic_gamma: γ of ``"automatic"``.
        clip_quantile: of ``"quantile"``: the share of gradients that C is to leave as they are; ``None`` for 0.5.
        clip_learning_rate: η of ``"quantile"`` (``None`` for 0.2) and ``"slaclip"`` (``None`` for 0.5): how fast log C moves.
        quantile_weight: κ of ``"quantile"``; ``None`` for 0.2. The more, the less noise in the quantile and the more in the
            gradient: (1 + κ²/4)^½ times that of a fixed C.
        slack_bins: K of ``"slaclip"``; ``None`` for 10.
        expected_batch_size: B over all ranks; ``None`` for the loader's ``batch_size`` × number of ranks.
        dataset_size: N, a public number of examples; ``None`` for ``len(dataset)``.
        physical_batch_size: the most examples that are worked on at once; ``None`` fills the memory
            on CUDA, as measured before training, and goes by rule of thumb elsewhere; ``"auto"`` measures what fits and is
            fast. Changes memory and speed, never the result.
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
        autotune: whether the forms in which a layer's share can be computed, and for recurrent modules the engines, are timed
            before the first step: ``True``, ``False``, or ``None``, unless there is a seed. Changes speed, and the result no
            more than rounding does (:mod:`lightning_dp.look.autotune`).
        batch_axis: the axis of the batch's tensors on which the examples are, 0 for the first; or by field, as in
            ``{"inputs": 1, "positions": None}``, where ``None`` marks a part that all examples share. It enters every
            example's gradient and must be public: the same whatever the examples are. ``"list"`` is for lists with one
            element for each example, as of images that differ in size. ``"each"`` calls ``collate_fn`` for every example
            alone, whatever it makes: slow, and always right.
        privacy_unit: who is protected, if one person has several examples: the field with the user (``"user_id"``), a file,
            or the users themselves. Users are then drawn, and counted in ``expected_batch_size`` and ``dataset_size``.
        adjacency: between which data sets the guarantee holds, N being the same number for both: ``"add_remove"``, one has one
            example (user) more; ``"zero_out"``, in one of them an example is replaced by one that adds nothing. ε is the same.
        max_examples_per_unit: the most examples of a user in a step, chosen at random; ``None`` for 32.
        row_wise: what you vouch for: ``"collate_fn"``, ``"__getitem__"``, ``"__getitems__"``, ``"on_before_batch_transfer"``,
            ``"transfer_batch_to_device"`` or ``"on_after_batch_transfer"`` makes each row of its own example alone. It is then
            given many at once, which is faster, and the statement says so. All others see one example at a time.
        public_state: names of attributes of the module, such as ``["teacher"]``, that hooks may change by what they learn in
            training, because you vouch for it that this is public. The statement says so. (What follows from released weights
            alone, as an average of them, needs no such word.)

        sampling: ``"poisson"``, or ``"cyclic_poisson"``: every example is in one of b groups at random, and a step draws from
            the group whose turn it is. Or in blocks of
            k = ⌈N/B⌉ steps, of which each example is in exactly one, drawn anew for each block (``"random_allocation"``) or the
            same in all (``"balls_in_bins"``): B is then N/k, and a block that is begun counts as whole.
        participations: t. With ``"random_allocation"`` blocks have t·k steps, of which each example is in exactly t.
        noise: ``"independent"``, or noise correlated over the steps, which partly cancels in the sum that momentum SGD makes:
            ``"banded"``, ``"lambda"`` or ``"bisr"`` (:class:`lightning_dp.plan.correlation.Correlation`). It needs
            ``sampling="cyclic_poisson"`` or ``"balls_in_bins"``.
        noise_bands: how many bands the strategy matrix has, of ``"banded"``, or its inverse, of ``"bisr"``.
        noise_momentum: β for which the matrix is found; ``None`` for the optimizer's own.
        gradient_filter: ``"disk"`` to put a Kalman filter between release and optimizer, at two gradients an example and the
            same ε (:class:`lightning_dp.plan.filtering.GradientFilter`).
        filter_gain: κ of ``"disk"``.
        filter_lookahead: γ of ``"disk"``.

        advantage: in place of ``epsilon``: the most that TPR − FPR of any membership test may be.
        tpr_at_fpr: in place of ``epsilon``: ``[TPR, FPR]``, the largest true positive rate at that false positive rate.
        mu: in place of ``epsilon``: μ of Gaussian DP. With any of the three, training stops at the ε at ``delta`` that it
            comes to, and the statement says both (:class:`lightning_dp.accounting.target.RiskTarget`).

    Raises:
        ValueError: a number is out of range, or not exactly one of ``epsilon``, ``noise_multiplier``, ``advantage``,
            ``tpr_at_fpr`` and ``mu`` is given.
        PreflightError: while ``fit`` is being set up, if module, data or Trainer cannot be trained privately.
        BudgetExceededError: if a step would overspend although training could not be stopped (``min_steps``).

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(max_steps=875, callbacks=[DifferentialPrivacy(epsilon=8.0, delta=1e-5)], logger=False)

    Source: Abadi et al. 2016, Algorithm 1 (arXiv 1607.00133); De, Berrada, Hayes, Smith, Balle 2022 (arXiv 2204.13650).
    """

    replay: Replay | None = None  # no argument: set by lightning_dp.verify on a copy of the callback

    @answered
    def __init__(
        self,
        epsilon: float | None = None,
        noise_multiplier: float | None = None,
        delta: float = 1e-5,
        clip_norm: float = 1.0,
        clipping: ClippingStyle = "flat",
        automatic_gamma: float = DEFAULT_GAMMA,
        clip_quantile: float | None = None,
        clip_learning_rate: float | None = None,
        quantile_weight: float | None = None,
        slack_bins: int | None = None,
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
        row_wise: list[str] | None = None,
        public_state: list[str] | None = None,
        sampling: SamplingScheme = "poisson",
        participations: int = 1,
        noise: NoiseStyle = "independent",
        noise_bands: int = DEFAULT_BANDS,
        noise_momentum: float | None = None,
        gradient_filter: FilterStyle | None = None,
        filter_gain: float = DEFAULT_GAIN,
        filter_lookahead: float = DEFAULT_LOOKAHEAD,
        advantage: float | None = None,
        tpr_at_fpr: list[float] | None = None,
        mu: float | None = None,
        adjacency: Adjacency = ADD_REMOVE,
        autotune: bool | None = None,
    ) -> None:
        self.epsilon = epsilon
        self.noise_multiplier = noise_multiplier
        self.delta = delta
        self.clip_norm = clip_norm
        self.clipping: ClippingStyle = clipping
        self.automatic_gamma = automatic_gamma
        self.clip_quantile = clip_quantile
        self.clip_learning_rate = clip_learning_rate
        self.quantile_weight = quantile_weight
        self.slack_bins = slack_bins
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
        self.sampling: SamplingScheme = sampling
        self.participations = participations
        self.noise: NoiseStyle = noise
        self.noise_bands = noise_bands
        self.noise_momentum = noise_momentum
        self.gradient_filter: FilterStyle | None = gradient_filter
        self.filter_gain = filter_gain
        self.filter_lookahead = filter_lookahead
        self.advantage = advantage
        self.tpr_at_fpr = tuple(tpr_at_fpr) if isinstance(tpr_at_fpr, list) else tpr_at_fpr
        self.mu = mu
        self.adjacency: Adjacency = adjacency
        self.autotune = autotune
        register_strategies()  # of a root of Lightning that was imported after this package
        self.public_optimizers = check_places(public_optimizers)
        self.row_wise = check_row_wise(row_wise)
        self.public_state = check_public_state(public_state)
        self.privacy_unit = unit_from(privacy_unit, max_examples_per_unit, static_shapes)
        Settings.of(self)  # refuses what is out of range, where it is given
        self._account = Account()
        self._fit: Fit | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy has the arguments and goes on from all that is spent; the fit under way stays with the original."""
        return {**self.__dict__, "_fit": None}

    @property
    def ledger(self) -> Ledger | None:
        """What is spent, once the training data are known; also by processes that the Trainer started (``ddp_spawn``, …)."""
        return self._account.ledger

    @property
    def plan(self) -> PrivacyPlan | None:
        """The plan in force, once the training data are known."""
        return None if self.ledger is None else self.ledger.plan

    @property
    def released(self) -> Mechanism | None:
        """The mechanism of the last gradient that was released in the fit under way, with the C and σ that it had.

        ``released.noise_std / released.divisor`` is the standard deviation of the noise on each of its coordinates. ``None``
        before the first.
        """
        return None if self._fit is None else self._fit.tally.released

    def statement(self) -> Statement:
        """What has been spent so far, as a statement that can be published.

        Raises:
            RuntimeError: training has not been set up yet.
        """
        report = self._account.report
        if report is not None:
            return report.statement()
        raise RuntimeError("statement() before fit: expected a run whose data are known. Call trainer.fit first.")

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        world = world_of(trainer.strategy)
        on_every_rank(world, lambda: check_before_setup(trainer, pl_module), PreflightError)
        check_same_on_every_rank(world, facts(Settings.of(self).to_agree_on(), trainer, world))
        strategy = make_private(trainer.strategy)
        self._account.start_fit(trainer)
        self._fit = strategy.private_fit = Fit(self, self._account, trainer, views_of(trainer))

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_module(pl_module)  # again: configure_model may have added the layers
        check_optimizers(pl_module, trainer.optimizers)
        check_public_optimizers(pl_module, trainer.optimizers, self.public_optimizers)
        check_filter(Settings.of(self).privacy.filter, trainer, pl_module)
        check_decisions(trainer, pl_module)
        advise_optimizers(trainer.optimizers, self.public_optimizers, self.noise_multiplier)
        if not trainer.strategy.restore_checkpoint_after_setup:
            self._under_way.set_up()

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.strategy.restore_checkpoint_after_setup:  # only now is the checkpoint's ledger known
            self._under_way.set_up()
        self._under_way.stop_if_spent()

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        for name, value in self._under_way.end_step().items():
            if not logged_again(pl_module, name, value):
                pl_module.log(name, value, prog_bar=name == "dp/epsilon", batch_size=1)
        self._under_way.stop_if_spent()

    @override
    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._account.validated(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._account.write(trainer, "ended", broken=self._under_way.tally.not_finite)

    @override
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._under_way.end()
        self._account.write(trainer, "ended")
        if self._account.report is not None:
            self._account.report.tell_end()
        self._account.close(ended=True)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._account.hear(trainer)
            self._account.write(trainer, "interrupted")  # what was released is spent, however it ended
        self._account.close(ended=False)
        self._fit = None

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._fit = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._fit is not None:
            self._fit.carry_on()
        spent = self._account.now()
        return {} if spent is None else with_digest(spent)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._account.resume(read_with_digest(state_dict) if state_dict else None)

    @override
    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            return
        on_every_rank(world_of(trainer.strategy), lambda: spent_of(checkpoint, self.state_key), PreflightError)
        self._under_way.goes_on_from(checkpoint)
        if said := self._account.filtered.load_state_dict(checkpoint.get(KEY), Settings.of(self).privacy.filter):
            rank_zero_warn(f"{said} ε does not depend on it.")

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.gradient_filter is not None:
            checkpoint[KEY] = self._account.filtered.state_dict()

    @property
    def _under_way(self) -> Fit:
        """The fit of which Lightning calls the hooks."""
        if self._fit is None:
            raise RuntimeError(
                "DifferentialPrivacy's hooks before setup: expected trainer.fit to call them. If the callback was added while "
                "fit ran, add it to Trainer(callbacks=[...]) before."
            )
        return self._fit
