"""The numbers of a fit: what was spent, what is planned, and who says so, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lightning_dp.accounting import Assumptions, Ledger
from lightning_dp.accounting.assumptions import SIZE_GIVEN, SIZE_READ, STEPS_READ
from lightning_dp.accounting.find_plan import Wanted
from lightning_dp.batches.units import Units
from lightning_dp.errors import PreflightError
from lightning_dp.look.correlated_noise import check_goes_with_correlated_noise, momentum_of
from lightning_dp.look.epochs import check_draws_in_an_epoch, check_end_was_given, ends_by_epochs
from lightning_dp.look.planning import (
    agreed_plan,
    check_batch_after_resume,
    check_dataset_stays,
    check_delta_for,
    check_plan_stays,
)
from lightning_dp.mechanism.adaptive import in_force
from lightning_dp.mechanism.complex import coordinates
from lightning_dp.mechanism.secure import resolution
from lightning_dp.plan.simulation import as_if_real, simulated
from lightning_dp.ranks.gathering import on_every_rank, on_rank_zero
from lightning_dp.ranks.world import World
from lightning_dp.record.account import Account
from lightning_dp.record.checkpoint import lost_since, with_lost_steps
from lightning_dp.record.course import facts_of
from lightning_dp.record.lost_steps import caveats, places
from lightning_dp.record.report import Report
from lightning_dp.settings import PrivacySettings, Settings


@dataclass(frozen=True)
class Agreed:
    """The numbers of a fit, the same on every rank.

    Attributes:
        ledger: with the plan, and the steps of earlier fits.
        report: of what it spends.
        noise_multiplier: σ, of the run that is simulated if it is a simulation.
        steps_before: how many steps the ledger counted when the fit began.
        facts: see :mod:`lightning_dp.record.course`.
    """

    ledger: Ledger
    report: Report
    noise_multiplier: float
    steps_before: int
    facts: str


def agree(
    settings: Settings,
    account: Account,
    trainer: pl.Trainer,
    world: World,
    loader: DataLoader[Any],
    units: Units | None,
    remaining_steps: int | None,
) -> Agreed:
    """Plan a fit. A collective call.

    Args:
        settings: what is asked for.
        account: what was spent before; steps that only journals have are added to it.
        trainer: with its module and optimizers.
        world: whose ranks have to agree.
        loader: the user's, as Lightning has prepared it.
        units: whose each example is, or ``None``.
        remaining_steps: how many steps this fit will take, or ``None`` if nothing but time bounds them.

    Raises:
        PreflightError: ranks disagree, or the numbers do not go together with what was spent.
        ValueError: a number is out of range, or no σ reaches ε.
        JournalError: a journal was edited or damaged.
    """
    privacy, where = settings.privacy, places(trainer, trainer.ckpt_path)
    sizes = sizes_of(privacy.dataset_size, trainer, remaining_steps)
    assumed = Assumptions(privacy.row_wise, privacy.public_state, sizes)
    vouched, filtered = (
        [] if replace(assumed, sizes=()) == Assumptions() else [assumed],
        [] if privacy.filter is None else [privacy.filter],
    )
    more = (privacy.automatic_gamma, settings.data.batch_axis, *vouched, *filtered)
    facts = "" if privacy.seed is None else facts_of(trainer, *more)
    lost = on_rank_zero(world, lambda: lost_since(account.before, where, facts))
    if account.before is not None:
        account.before = with_lost_steps(account.before, lost)
    spent = None if account.before is None else account.before.ledger
    wanted = _wanted(privacy, privacy.noise_multiplier, trainer)
    check_goes_with_correlated_noise(privacy, trainer, account.unused_samples)
    carried = account.carried.state_dict()
    real = agreed_plan(world, loader, units, wanted, as_if_real(spent, privacy.simulate), remaining_steps, carried)
    plan = simulated(real, privacy.simulate)
    on_every_rank(world, lambda: in_force(plan.mechanism, account.carried), PreflightError)
    check_delta_for(plan)
    check_draws_in_an_epoch(trainer, real, loader)
    check_end_was_given(trainer, plan)
    ranks_before = None if account.before is None else account.before.world_size
    check_batch_after_resume(plan, spent, privacy.expected_batch_size, ranks_before, world.size)
    ledger = Ledger(plan, assumed) if spent is None else Ledger.resume(plan, spent, assumed)
    ledger.course = "" if account.lineage is None else account.lineage.course
    notes = on_rank_zero(world, lambda: caveats(account.lineage, ledger.numbers, where, privacy.seed is not None))
    if privacy.risk is not None:
        notes = (f"the noise was found for {privacy.risk}; target_epsilon is the ε of that at this δ", *notes)
    return Agreed(ledger, Report(ledger, privacy.randomness, notes), real.noise_multiplier, ledger.steps, facts)


def sizes_of(dataset_size: int | None, trainer: pl.Trainer, remaining_steps: int | None) -> tuple[str, ...]:
    """How N and T came about, for the statement."""
    size = SIZE_READ if dataset_size is None else SIZE_GIVEN
    return (size, STEPS_READ) if ends_by_epochs(trainer, remaining_steps) else (size,)


def check_still_agreed(
    settings: Settings,
    agreed: Agreed,
    account: Account,
    module: pl.LightningModule,
    world: World,
    loader: DataLoader[Any],
    units: Units | None,
    remaining_steps: int | None,
) -> None:
    """Refuse another loader in mid-run by which the plan would be another one. A collective call.

    Arguments are as of :func:`agree`.

    Raises:
        PreflightError: see the message.
    """
    check_dataset_stays(agreed.ledger.plan)
    privacy, spent = settings.privacy, None if account.before is None else account.before.ledger
    wanted = _wanted(privacy, agreed.noise_multiplier, module.trainer)
    real = agreed_plan(world, loader, units, wanted, as_if_real(spent, privacy.simulate), remaining_steps)
    check_plan_stays(agreed.ledger.plan, simulated(real, privacy.simulate))


def _wanted(privacy: PrivacySettings, noise_multiplier: float | None, trainer: pl.Trainer) -> Wanted:
    """The numbers asked for, with those of the module's size that discrete noise needs, and of the optimizer."""
    return Wanted(
        delta=privacy.delta,
        clipping=privacy.clipping_rule,
        epsilon=privacy.epsilon,
        noise_multiplier=noise_multiplier,
        expected_batch_size=privacy.expected_batch_size,
        dataset_size=privacy.dataset_size,
        max_batch_size=privacy.max_batch_size,
        resolution=resolution(privacy.secure),
        coordinates=coordinates(trainer.lightning_module.parameters()) + privacy.clipping_rule.coordinates
        if privacy.secure
        else None,
        sampling=privacy.sampling,
        participations=privacy.participations,
        noise=privacy.noise,
        noise_bands=privacy.noise_bands,
        risk=privacy.risk,
        noise_momentum=momentum_of(trainer) if privacy.noise_momentum is None else privacy.noise_momentum,
        filter=privacy.filter,
        adjacency=privacy.adjacency,
    )
