"""The private step inside Lightning: what both private strategies delegate to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from lightning_dp import preflight
from lightning_dp.accounting import Ledger
from lightning_dp.agreement import check_same_data_on_every_rank, check_same_parameters_on_every_rank
from lightning_dp.capture import StepCapture
from lightning_dp.coupling import check_rows_stay_apart
from lightning_dp.engines.ghost import GhostEngine
from lightning_dp.engines.ghost.verification import check_agreement
from lightning_dp.engines.select import EngineName, Selection, select_engine
from lightning_dp.functional.gradient import Engine, LossFunction
from lightning_dp.functional.randomness import RandomKey, Stream
from lightning_dp.functional.step import Accumulated, accumulate, release
from lightning_dp.functional.views import Views, view_uniforms
from lightning_dp.loader import LogicalBatch, PoissonLoader
from lightning_dp.plan import PrivacyPlan
from lightning_dp.transfer import let_logical_batches_through, stop_letting_through, to_device

Planner = Callable[[DataLoader[Any]], Ledger]
"""Turns the user's training loader into the ledger of the run, which holds the plan."""

TRIAL_EXAMPLES = 2


class PrivateStep:
    """From a logical batch to a noisy gradient in ``p.grad``, in the order in which Lightning asks for it.

    :meth:`process_dataloader` → :meth:`choose_engine` → for each step :meth:`training_step`, then :meth:`backward`.
    The step itself is :mod:`lightning_dp.functional.step`; this class only feeds it and carries its result home.

    Args:
        planner: makes the plan when the training loader is known; called again if Lightning reloads it.
        seed: ``None`` for secret randomness, a number for a reproducible run.
        engine: name of the engine, see :data:`lightning_dp.engines.select.EngineName`.
        physical_batch_size: the most examples in a micro-batch, or ``None`` for a size that suits the module.
        log_train_metrics: whether what training_step logs reaches the loggers.
        views: how the K augmented views of each example are made, or ``None`` for the examples as they are.
    """

    def __init__(
        self,
        planner: Planner,
        *,
        seed: int | None = None,
        engine: EngineName = "auto",
        physical_batch_size: int | None = None,
        log_train_metrics: bool = True,
        views: Views | None = None,
    ) -> None:
        self._planner = planner
        self._views = views
        self._seed = seed
        self._engine_name: EngineName = engine
        self._physical_batch_size = physical_batch_size
        self._log_train_metrics = log_train_metrics
        self._loader: PoissonLoader | None = None
        self._selection: Selection | None = None
        self._ledger: Ledger | None = None
        self._key: RandomKey | None = None
        self._capture: StepCapture | None = None
        self._pending: tuple[Accumulated, dict[str, nn.Parameter]] | None = None
        self._told = False
        self.not_finite = 0

    def process_dataloader(self, strategy: Strategy, dataloader: object) -> PoissonLoader:
        """Replace the user's training loader by one of Poisson-sampled logical batches.

        Raises:
            PreflightError: the loader cannot be sampled by Poisson, or there are several of them.
        """
        module = _module(strategy)
        loader = preflight.check_loader(dataloader)
        if self._loader is not None and module.trainer.fit_loop._combined_loader is None:
            raise preflight.PreflightError(
                "several training loaders: expected exactly one. Each would need a budget of its own; join the datasets "
                "with torch.utils.data.ConcatDataset."
            )
        ledger = self._ledger = self._planner(loader)
        key = self._key = self._key or _shared_key(strategy, self._seed)
        size = self._physical_batch_size or _default_physical_batch_size(
            module, ledger.plan, strategy, self._views.k if self._views else 1
        )
        self._loader = PoissonLoader(
            loader,
            ledger.plan,
            key,
            rank=_rank(strategy),
            world_size=_world_size(strategy),
            physical_batch_size=size,
            next_step=lambda: ledger.steps,
        )
        return self._loader

    def choose_engine(self, strategy: Strategy) -> Selection:
        """Try engines on two examples and keep the one to train with. Nothing of the trial is kept or released.

        Raises:
            EngineError: the engine asked for cannot run this training_step.
            PreflightError: training_step changes a buffer, or returns no loss.
        """
        module, loader = _module(strategy), self._loader
        assert loader is not None
        let_logical_batches_through(module)
        given: Any = module.trainer.train_dataloader
        if given is not self._loader:
            raise preflight.PreflightError(
                f"train_dataloader nested in a {type(given).__name__}: expected the DataLoader "
                "itself. Pass the loader without a list, dict or CombinedLoader around it."
            )
        check_same_data_on_every_rank(strategy, loader.dataset)
        check_same_parameters_on_every_rank(strategy, module)
        self._capture = StepCapture(module)
        loss_function = self._loss_function(strategy, (0,) if _takes_batch_idx(module) else ())
        buffers = preflight.buffer_versions(module)
        with isolate_rng(), torch.enable_grad():
            batch, examples = loader.first_examples(TRIAL_EXAMPLES)
            check_rows_stay_apart(
                lambda raw: to_device(strategy, raw), batch, examples, "on_before_ or on_after_batch_transfer"
            )

            def with_views(raw: Any) -> Any:
                return self._with_views(to_device(strategy, raw), np.arange(examples), seed=torch.initial_seed())

            if self._views is not None:
                check_rows_stay_apart(with_views, batch, examples, "the transform of AugmentationMultiplicity")
            on_device, clip_norm = with_views(batch), loader.plan.clip_norm

            def trial(engine: Engine) -> None:
                engine.clipped_sum(loss_function, _trainable(module), on_device, examples, clip_norm)
                if isinstance(engine, GhostEngine):
                    check_agreement(engine, loss_function, _trainable(module), on_device, examples)

            self._selection = select_engine(self._engine_name, trial, module)
        preflight.check_buffers(module, buffers)
        rank_zero_info(self._selection.describe())
        return self._selection

    def training_step(self, strategy: Strategy, batch: Any, *rest: Any) -> STEP_OUTPUT:
        """Sum this rank's clipped per-example gradients over the logical batch; keep them for :meth:`backward`.

        Returns:
            What the user's training_step would return for the whole batch: the mean loss, detached, or a dict with it.
            With no example on this rank the loss is 0.
        """
        module, ledger, key, capture = _module(strategy), self._ledger, self._key, self._capture
        assert ledger is not None
        assert key is not None
        assert capture is not None
        assert self._selection is not None
        if not isinstance(batch, LogicalBatch):
            raise RuntimeError(
                f"batch of type {type(batch).__name__}: expected a LogicalBatch. Something replaced the private training "
                "loader; pass the data to trainer.fit as usual and do not touch trainer.fit_loop."
            )
        if batch.step != ledger.steps:
            raise RuntimeError(
                f"The sample of step {batch.step} arrived when {ledger.steps} steps are charged: expected one release for "
                "each sample. An override of optimizer_step or a callback left a batch unused; step on every batch."
            )
        mode = [layer for layer in preflight.batch_norms(module) if layer.training]
        if mode:
            raise preflight.PreflightError(
                f"{len(mode)} BatchNorm layers were switched to train mode during training: expected eval mode. Do not "
                "call .train() on a frozen part; batch statistics mix the examples."
            )
        parameters, buffers = _trainable(module), preflight.buffer_versions(module)
        with _forked_rng(strategy.root_device, key.torch_seed(Stream.DROPOUT, batch.step, _rank(strategy))):
            total = accumulate(
                self._selection.engine,
                self._loss_function(strategy, rest),
                parameters,
                self._micro_batches(strategy, batch, key),
                ledger.plan.clip_norm,
            )
        preflight.check_buffers(module, buffers)
        self._pending = total, parameters
        self.not_finite += total.not_finite

        extras: dict[str, Any] = {}
        if self._log_train_metrics:
            some_rank_is_empty = 0 < batch.global_size < _world_size(strategy)
            extras = capture.replay(total.outputs, total.examples, strategy.broadcast if some_rank_is_empty else None)
            self._say_once_that_metrics_are_private(capture.logged_names)
        loss = torch.cat(total.losses).mean() if total.losses else torch.zeros((), device=strategy.root_device)
        return {"loss": loss, **extras} if extras else loss

    def backward(self, strategy: Strategy, closure_loss: Tensor) -> Tensor:
        """Charge the ledger, release the noisy gradient, and put it into ``p.grad`` of the trainable parameters.

        Raises:
            BudgetExceededError: the step would overspend the target ε. Nothing is released.
        """
        ledger, key, pending = self._ledger, self._key, self._pending
        if pending is None or ledger is None or key is None:
            raise RuntimeError(
                "backward without a private training_step: expected one training_step for each backward. "
                "Use automatic optimization and an optimizer that calls its closure once per step."
            )
        total, parameters = pending
        self._pending = None
        module = _module(strategy)
        strategy.pre_backward(closure_loss)
        strategy.precision_plugin.pre_backward(closure_loss, module)
        step = ledger.steps
        ledger.charge()
        gradient = release(
            total.gradient,
            ledger.plan,
            key,
            step,
            rank=_rank(strategy),
            all_reduce_sum=lambda flat: strategy.reduce(flat, reduce_op="sum"),
        )
        for name, parameter in parameters.items():
            parameter.grad = gradient[name].to(parameter.dtype)
        closure_loss = strategy.precision_plugin.post_backward(closure_loss, module)
        strategy.post_backward(closure_loss)
        return closure_loss

    def teardown(self, strategy: Strategy) -> None:
        """Forget the key and leave the module as it was found."""
        self._key = None
        self._pending = None
        stop_letting_through(_module(strategy))

    @property
    def randomness(self) -> Literal["secret", "reproducible"]:
        """Where sampling and noise come from."""
        return "secret" if self._seed is None else "reproducible"

    @property
    def physical_batch_size(self) -> int | None:
        """The most examples in a micro-batch, once the loader is known."""
        return self._physical_batch_size if self._loader is None else self._loader.physical_batch_size

    def _micro_batches(self, strategy: Strategy, batch: LogicalBatch, key: RandomKey) -> Iterator[tuple[Any, int]]:
        """The micro-batches of a step on the device, with their views, and how many examples each holds."""
        seed, start = int.from_bytes(key.derive(Stream.VIEWS, batch.step, size=8), "big"), 0
        for micro_batch, size in batch.micro_batches():
            indices = batch.indices[start : start + size].numpy()
            yield self._with_views(to_device(strategy, micro_batch), indices, seed), size
            start += size

    def _with_views(self, batch: Any, indices: npt.NDArray[np.int64], seed: int) -> Any:
        """A micro-batch whose tensors are ``(B, K, ...)``, or as it is without views."""
        if self._views is None:
            return batch
        uniforms = view_uniforms(seed, indices, self._views.k, self._views.transform.draws)
        return self._views.expand(batch, len(indices), uniforms)

    def _say_once_that_metrics_are_private(self, names: list[str]) -> None:
        if names and not self._told:
            self._told = True
            rank_zero_info(
                f"lightning_dp: training_step logs {', '.join(names[:5])}: computed from private examples without noise, so "
                "the guarantee does not cover them. Keep such logs private, or use "
                "DifferentialPrivacy(log_train_metrics=False)."
            )

    def _loss_function(self, strategy: Strategy, rest: tuple[Any, ...]) -> LossFunction:
        """The user's own training_step on a batch of one (on its K views), as a function of the parameters."""
        module, capture = _module(strategy), self._capture
        assert capture is not None
        stepper = _TrainingStep(module)

        def loss_function(parameters: Mapping[str, Tensor], example: Any) -> tuple[Tensor, Any]:
            named = {f"module.{name}": parameter for name, parameter in parameters.items()}
            example = example if self._views is None else self._views.fold(example)
            with strategy.precision_plugin.train_step_context():
                return capture.run(lambda: functional_call(stepper, named, (example, *rest)))

        return loss_function


class _TrainingStep(nn.Module):
    """``functional_call`` calls ``forward``; this makes that the module's ``training_step``."""

    def __init__(self, module: pl.LightningModule) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Any:
        return self.module.training_step(*args)


def _shared_key(strategy: Strategy, seed: int | None) -> RandomKey:
    """The run's key, the same on every rank: from the seed, or rank 0's operating-system entropy, written nowhere."""
    if seed is not None:
        return RandomKey.from_seed(seed)
    return RandomKey(strategy.broadcast(RandomKey.fresh().reveal()), "secret")


def _module(strategy: Strategy) -> pl.LightningModule:
    module = strategy.lightning_module
    assert module is not None
    return module


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _takes_batch_idx(module: pl.LightningModule) -> bool:
    """Whether Lightning passes ``batch_idx`` to this module's training_step."""
    return is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)


def _rank(strategy: Strategy) -> int:
    return int(getattr(strategy, "global_rank", 0))


def _world_size(strategy: Strategy) -> int:
    return int(getattr(strategy, "world_size", 1))


def _default_physical_batch_size(module: nn.Module, plan: PrivacyPlan, strategy: Strategy, views: int) -> int:
    """One micro-batch for nearly every step if its per-example gradients fit in 512 MiB (8 GiB on an accelerator).

    At most 512 views, because their activations take memory too.
    """
    parameters = sum(parameter.numel() for parameter in _trainable(module).values())
    room = (2**29 if strategy.root_device.type == "cpu" else 2**33) // (4 * max(parameters, 1))
    share = plan.expected_batch_size / _world_size(strategy)
    return max(1, min(room, 512 // views, math.ceil(share + 4 * math.sqrt(share))))


@contextmanager
def _forked_rng(device: torch.device, seed: int) -> Iterator[None]:
    """Torch's global generators seeded for this step's random layers, and put back afterwards."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
