"""More planted bugs: in the sampling, around the step and in the accounting. See :mod:`tests.guarantees.mutations`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning_dp.accounting.epsilon as epsilon_module
import lightning_dp.accounting.find_plan as find_plan_module
import lightning_dp.accounting.ledger as ledger_module
import lightning_dp.callbacks.differential_privacy as callback_module
import lightning_dp.layers.batch_norm as batch_norm_module
import lightning_dp.loading.draws as draws_module
import lightning_dp.loading.loader as loader_module
import lightning_dp.look.agreed as agreed_module
import lightning_dp.look.module as module_module
import lightning_dp.record.report as report_module
import lightning_dp.run as run_module
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.step.logs import StepCapture
from lightning_dp.step.planned import Run
from tests.guarantees.mutations import patched

# --- sampling ---------------------------------------------------------------------------------------------------------


@contextmanager
def shuffled_fixed_batches() -> Iterator[None]:
    """PT#7, O#80, J#84: batches of a fixed size, accounted for as Poisson samples."""

    def fixed(generator: Any, examples: int, q: float) -> Any:
        return sorted_choice(generator, examples, round(examples * q))

    with patched((draws_module, "poisson_sample", fixed)):
        yield


def sorted_choice(generator: Any, examples: int, size: int) -> Any:
    drawn = generator.choice(examples, size=size, replace=False)
    drawn.sort()
    return drawn


@contextmanager
def own_draw_on_every_rank() -> Iterator[None]:
    """Each rank samples its own part of the data, all with one seed: the local masks are identical."""
    draw, init = draws_module.poisson_sample, draws_module.Draws.__init__

    def remember(self: Any, dataset: Any, plan: Any, key: Any, rank: int, world_size: int, *rest: Any) -> None:
        init(self, dataset, plan, key, rank, world_size, *rest)
        self._rank, self._world_size = rank, world_size

    def local(self: Any, step: int) -> Any:
        generator = self._key.generator(draws_module.Stream.SAMPLING, step)
        mine = draw(generator, self.dataset_size // self._world_size, self._plan.sampling_probability)
        return mine * self._world_size + self._rank, len(mine) * self._world_size

    with patched((draws_module.Draws, "__init__", remember), (draws_module.Draws, "at", local)):
        yield


@contextmanager
def empty_local_batches_are_dropped() -> Iterator[None]:
    """A rank without examples takes no step, while the others do."""
    original = loader_module.PoissonLoader.__iter__

    def iterate(self: Any) -> Any:
        return (batch for batch in original(self) if len(batch.indices))

    with patched((loader_module.PoissonLoader, "__iter__", iterate)):
        yield


@contextmanager
def any_loader_is_accepted() -> Iterator[None]:
    """Samplers are not looked at."""
    with patched((run_module, "check_loader", lambda loader: loader)):
        yield


@contextmanager
def accounted_with_one_over_the_loaders_length() -> Iterator[None]:
    """O#813: q = 1/len(loader), whatever the sampler does."""
    original = ledger_module.phase_of

    def of(mechanism: Mechanism, steps: int) -> Any:
        wrong = mechanism.sampling.dataset_size / math.ceil(1 / mechanism.sampling.probability)
        return original(mechanism.but(expected_batch_size=wrong), steps)

    with patched((ledger_module, "phase_of", of)):
        yield


# --- around the step --------------------------------------------------------------------------------------------------


@contextmanager
def batch_norm_is_accepted() -> Iterator[None]:
    """No look at the layers."""
    with patched(
        (module_module, "mixes_examples", lambda layer: False), (batch_norm_module, "batch_norms", lambda _: [])
    ):
        yield


@contextmanager
def optimizer_is_wrapped() -> Iterator[None]:
    """DT#43, O#660: what steps is another optimizer than the one whose rate the scheduler moves."""
    original = callback_module.DifferentialPrivacy.on_fit_start

    def on_fit_start(self: Any, trainer: Any, module: Any) -> None:
        original(self, trainer, module)
        kept = [type(one)(module.parameters(), lr=one.defaults["lr"]) for one in trainer.strategy.optimizers]
        trainer.strategy.optimizers = kept

    with patched((callback_module.DifferentialPrivacy, "on_fit_start", on_fit_start)):
        yield


@contextmanager
def train_metrics_are_not_mentioned() -> Iterator[None]:
    """Nobody is told that training metrics carry no noise."""
    with patched((StepCapture, "say_once_that_logs_are_private", lambda *_: None)):
        yield


@contextmanager
def the_switch_for_train_metrics_does_nothing() -> Iterator[None]:
    """``log_train_metrics=False`` is accepted and forgotten."""

    def run(*args: Any, **options: Any) -> Run:
        return Run(*args, **{**options, "log_train_metrics": True})

    with patched((run_module, "Run", run)):
        yield


@contextmanager
def floating_point_noise_is_not_mentioned() -> Iterator[None]:
    """The statement says nothing about the noise's arithmetic."""
    kept = {**report_module.CAVEATS_OF_NOISE, "floating": ()}
    with patched((report_module, "CAVEATS_OF_NOISE", kept)):
        yield


# --- accounting -------------------------------------------------------------------------------------------------------


@contextmanager
def spent_budget_is_forgotten() -> Iterator[None]:
    """O#778: a resumed run starts with an empty ledger."""
    fresh = classmethod(lambda cls, plan, state, *_: cls(plan))
    with patched((ledger_module.Ledger, "resume", fresh)):
        yield


@contextmanager
def ledger_never_says_no() -> Iterator[None]:
    """The budget is reported and not enforced."""
    with patched((ledger_module.Ledger, "can_charge", lambda self: True)):
        yield


@contextmanager
def noise_found_too_small(factor: float) -> Iterator[None]:
    """The search for σ ends on the wrong side of the target."""
    original = find_plan_module.noise_for
    with patched((find_plan_module, "noise_for", lambda *args, **options: factor * original(*args, **options))):
        yield


@contextmanager
def epochs_rounded_down() -> Iterator[None]:
    """O#308: σ is found for fewer steps than the run will take."""
    original = agreed_module.agreed_plan

    def agreed_plan(
        world: Any, data: Any, units: Any, wanted: Any, spent: Any, remaining_steps: int | None, *rest: Any
    ) -> PrivacyPlan:
        return original(world, data, units, wanted, spent, (remaining_steps or 4) - 3, *rest)

    with patched((agreed_module, "agreed_plan", agreed_plan)):
        yield


@contextmanager
def the_lower_bound_is_reported() -> Iterator[None]:
    """The accountant's lower bound on ε in place of the upper one."""
    original = epsilon_module.pld_bound

    def lower(phases: Any, delta: float) -> float:
        return max(0.0, original(phases, delta) - 0.01)

    epsilon_module._bound_of.cache_clear()
    with patched((epsilon_module, "pld_bound", lower)):
        yield
    epsilon_module._bound_of.cache_clear()


@contextmanager
def a_failing_accountant_says_zero() -> Iterator[None]:
    """P#36: trouble inside the accountant ends as a small or negative ε."""
    epsilon_module._bound_of.cache_clear()
    with patched((epsilon_module, "rdp_epsilon", lambda phases, delta: 0.0)):
        yield
    epsilon_module._bound_of.cache_clear()


@contextmanager
def every_example_once_an_epoch() -> Iterator[None]:
    """The data are shuffled and dealt out in batches, as every loader does without privacy."""

    def dealt(self: Any, step: int) -> Any:
        epoch = round(1 / self._plan.sampling_probability)
        order = self._key.generator(draws_module.Stream.SAMPLING, step // epoch).permutation(self.dataset_size)
        mine = order[step % epoch :: epoch]
        mine.sort()
        return mine, len(mine)

    with patched((draws_module.Draws, "at", dealt)):
        yield
