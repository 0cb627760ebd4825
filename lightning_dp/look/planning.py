"""One plan on all ranks, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from lightning_dp.accounting.find_plan import Known, Wanted, before_noise, ledger_of, with_noise
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.batches.units import Units
from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.loading.reading import order
from lightning_dp.plan.mechanism import EXAMPLE
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.ranks.agreement import check_same_on_every_rank
from lightning_dp.ranks.gathering import on_every_rank, on_rank_zero
from lightning_dp.ranks.world import World


def known_of(world: World, loader: DataLoader[Any], units: Units | None, remaining_steps: int | None) -> Known:
    """What the plan is made from beside the numbers asked for.

    Args:
        world: how many ranks there are.
        loader: the user's training loader; preflight saw that its dataset has a length.
        units: whose each example is, or ``None`` where each is a unit of its own.
        remaining_steps: how many further steps this ``fit`` will take, or ``None`` if nobody knows.
    """
    return Known(
        length=len(loader.dataset if units is None else units),  # type: ignore[arg-type]  # preflight saw that it has a length
        batch_size=loader.batch_size,
        remaining_steps=remaining_steps,
        ranks=world.size,
        unit=EXAMPLE if units is None else units.name,
    )


def agreed_plan(
    world: World,
    loader: DataLoader[Any],
    units: Units | None,
    wanted: Wanted,
    spent: Mapping[str, Any] | None,
    remaining_steps: int | None,
    carried: Mapping[str, Any] | None = None,
) -> PrivacyPlan:
    """The plan of a run, computed on rank 0 and checked to suit every rank's data. A collective call.

    Args:
        world: whose ranks agree.
        loader: the user's training loader.
        units: whose each example is, or ``None`` where each is a unit of its own.
        wanted: the numbers asked for.
        spent: the state of a ledger that this run continues, or ``None``.
        remaining_steps: how many further steps this ``fit`` will take, or ``None`` if nobody knows.
        carried: what the mechanism has carried here, or ``None`` in mid-run.

    Raises:
        PreflightError: the number of steps is unknown although σ must be found, or ranks disagree.
        ValueError: a number is out of range, or no σ reaches ε.
    """
    known = known_of(world, loader, units, remaining_steps)
    mine = on_every_rank(world, lambda: before_noise(wanted, known, spent), PreflightError)
    check_same_on_every_rank(
        world,
        {
            "len(dataset)": len(loader.dataset),  # type: ignore[arg-type]  # as above
            "whose each example is (digest)": None if units is None else units.digest,
            "steps already charged": ledger_of(mine, spent).steps,
            "the checkpoint's ledger": spent,
            "what the mechanism carries": carried,
            **mine.numbers,
            "len(train_dataloader)": len(loader),  # an epoch: a rank with a shorter one would leave the others waiting
        },
    )
    return on_rank_zero(world, lambda: with_noise(mine, wanted, spent))


def check_delta_for(plan: PrivacyPlan) -> None:
    """Warn when δ is so large that publishing one whole record would satisfy it."""
    if plan.delta >= 1 / plan.dataset_size:
        warn_user(
            f"delta={plan.delta} with dataset_size={plan.dataset_size}: expected well below 1/{plan.dataset_size} = "
            f"{1 / plan.dataset_size:.2g}. At this δ, publishing a random record in the clear would count as private."
        )


def check_batch_after_resume(
    plan: PrivacyPlan, spent: dict[str, Any] | None, given: int | None, ranks_before: int | None, ranks: int
) -> None:
    """Refuse a resume in which another number of ranks, and nothing else, would change the expected batch size.

    Args:
        plan: of the steps to come.
        spent: the state of the ledger that the run continues, or ``None``.
        given: the expected batch size asked for, or ``None`` for the loader's ``batch_size`` × ranks.
        ranks_before: how many ranks took the steps before, or ``None`` if nobody knows.
        ranks: how many there are now.

    Raises:
        PreflightError: the batch, and with it q and σ, would change because the number of ranks does.
    """
    phases = spent["phases"] if spent else []
    if given is not None or ranks_before in (None, ranks) or not phases:
        return
    before, now = phases[-1]["expected_batch_size"], plan.expected_batch_size
    if before != now:
        raise PreflightError(
            f"expected_batch_size=None with {ranks} ranks after {ranks_before}: expected the batch of the steps before, "
            f"{before:g}, and the loader's batch_size × ranks is {now:g}. Give DifferentialPrivacy(expected_batch_size="
            f"{before:g}) to go on as before at any number of ranks, or {now:g} to change it on purpose."
        )


def check_blocks(ledger: Ledger) -> None:
    """Warn where the last block of the plan is cut: it costs as much as a whole one."""
    plan = ledger.plan
    block = plan.mechanism.sampling.block
    remaining = 0 if plan.steps is None else plan.steps - ledger.begun_at
    if remaining % block:
        whole = remaining - remaining % block
        warn_user(
            f"sampling={plan.sampling!r} with {remaining} steps to take in blocks of {block}: expected a multiple of {block}, "
            f"such as {f'{whole} or ' if whole else ''}{whole + block}. A part of a block "
            "costs as much as the whole, since an example may be in any of its steps; ε is that of the whole block."
        )


def stretch_of(ledger: Ledger, key: str, dataset: Any) -> str:
    """The name of the randomness of the steps to come: the digest of its key, and of what says which example is where.

    Args:
        ledger: with the steps before.
        key: the digest of the key.
        dataset: of the training loader.

    Raises:
        PreflightError: the steps before were taken with the same key on another order of the data, by which an example may be
            in other steps than those that are left to it.
    """
    if ledger.plan.mechanism.memoryless:
        return ""
    name = f"{key}:{order(dataset)[:16]}"
    if key in ledger.stretches:  # of a version that did not write the order down
        return key
    others = [one for one in ledger.stretches if one.split(":")[0] == key and one != name]
    if others:
        raise PreflightError(
            f"sampling={ledger.plan.sampling!r} resumed with the same seed on a dataset whose indices are others than in the "
            "steps before: expected the same examples in the same order. It follows from an example's index which steps it may "
            "be in, and in another order it might be in more. Resume on the same data, or with another seed, so that the "
            "randomness begins anew."
        )
    return name


def check_dataset_stays(plan: PrivacyPlan) -> None:
    """Refuse another loader in mid-run where it follows from an example's index which steps it may be in.

    Raises:
        PreflightError: see the message.
    """
    if not plan.mechanism.memoryless:
        raise PreflightError(
            f"sampling={plan.sampling!r} with reload_dataloaders_every_n_epochs: expected one training loader throughout. "
            "It follows from an example's index which steps it may be in, and in another order it might be in more. "
            "Leave out reload_dataloaders_every_n_epochs, or give sampling='poisson'."
        )


def check_plan_stays(before: PrivacyPlan, now: PrivacyPlan) -> None:
    """Refuse other training data in mid-run, as by ``reload_dataloaders_every_n_epochs``.

    Raises:
        PreflightError: see the message.
    """
    if now != before:
        raise PreflightError(
            f"the training data changed during the run: planned {before}, now {now}: expected the same "
            "dataset size, batch size and number of steps throughout. Keep them fixed, or give dataset_size, "
            "expected_batch_size and, since an epoch is len(train_dataloader), Trainer(max_steps=...)."
        )


@rank_zero_only
def warn_spent(epsilon: float | None, delta: float, steps: int) -> None:
    """Say why training stops before its end."""
    warn_user(
        f"The privacy budget is spent: one more step would pass ε = {epsilon} at δ = {delta} "
        f"({steps} steps are charged). Training stops here. A new model needs a DifferentialPrivacy of its "
        "own."
    )
