"""From Trainer, loader and arguments to one plan, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.utils.data import DataLoader

from lightning_dp.accounting import Ledger, check_distance_is_affordable, noise_multiplier_for, noise_with_reserve
from lightning_dp.batches.units import Units
from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.plan.clipping import Clipping
from lightning_dp.plan.privacy_plan import EXAMPLE, PrivacyPlan
from lightning_dp.ranks.agreement import check_same_on_every_rank
from lightning_dp.ranks.gathering import on_every_rank, on_rank_zero
from lightning_dp.ranks.world import World


def agreed_plan(
    world: World,
    loader: DataLoader[Any],
    units: Units | None,
    *,
    epsilon: float | None,
    noise_multiplier: float | None,
    delta: float,
    clipping: Clipping,
    expected_batch_size: int | None,
    dataset_size: int | None,
    max_batch_size: int | None = None,
    resolution: int | None = None,
    coordinates: int | None = None,
    spent: dict[str, Any] | None,
    remaining_steps: Callable[[], int | None],
) -> PrivacyPlan:
    """The plan of a run, computed on rank 0 and checked to suit every rank's data.

    Args:
        world: whose ranks agree.
        loader: the user's training loader; ``batch_size`` × ranks is the expected batch size unless given.
        units: whose each example is, or ``None`` where each is a unit of its own.
        epsilon: target ε, or ``None``.
        noise_multiplier: σ, or ``None`` to have it found.
        delta: δ.
        clipping: C and how it is kept.
        expected_batch_size: B, or ``None``.
        dataset_size: N, of examples or of units, or ``None``.
        max_batch_size: M, or ``None`` for draws of any size.
        resolution: Δ, the clip norm in units of the grid of discrete noise, or ``None`` for noise in floating point.
        coordinates: P, how many trainable coordinates there are; needed with ``resolution``.
        spent: the state of a ledger that this run continues, or ``None``.
        remaining_steps: how many further steps this ``fit`` will take.

    Raises:
        PreflightError: the number of steps is unknown although σ must be found, or ranks disagree.
        ValueError: a number is out of range, or no σ reaches ε.
    """
    world_size = world.size
    length = len(loader.dataset if units is None else units)  # type: ignore[arg-type]  # preflight saw that it has a length
    size = dataset_size if dataset_size is not None else length
    batch = expected_batch_size if expected_batch_size is not None else (loader.batch_size or 1) * world_size

    def plan(sigma: float) -> PrivacyPlan:
        probe = PrivacyPlan(
            noise_multiplier=sigma,
            clip_norm=clipping.clip_norm,
            clipping=clipping.style,
            automatic_gamma=clipping.gamma,
            delta=delta,
            dataset_size=size,
            expected_batch_size=batch,
            max_batch_size=max_batch_size,
            resolution=resolution,
            coordinates=coordinates,
            unit=EXAMPLE if units is None else units.name,
        )
        remaining = remaining_steps()
        steps = None if remaining is None else _ledger(probe, spent).steps + remaining
        return replace(probe, steps=steps, target_epsilon=epsilon)

    def found() -> float:
        assert epsilon is not None
        probe = plan(1.0)
        history = _ledger(probe, spent)
        if probe.steps is None:
            raise PreflightError(
                f"epsilon={epsilon} without an end: expected Trainer(max_steps=...) or Trainer(max_epochs=...). The noise "
                "is found for a planned number of steps; training may still stop earlier, for instance by max_time."
            )
        last = history.phases[-1] if history.phases else None
        remaining = probe.steps - history.steps
        if last is not None and (last.sampling_probability == probe.sampling_probability or remaining == 0):
            return last.noise_multiplier  # go on as before; the ledger stops the run before it overspends
        more, q, phases = max(remaining, 1), probe.sampling_probability, history.phases
        return noise_with_reserve(
            lambda left: noise_multiplier_for(epsilon, left, q, more, history=phases),
            epsilon,
            delta,
            lambda sigma: _ledger(plan(sigma), spent).distance(history.steps + more),
        )

    def probe() -> PrivacyPlan:
        if expected_batch_size is None and batch > size > 0:
            ranks = "" if world_size == 1 else f" on each of {world_size} ranks"
            raise PreflightError(
                f"batch_size={loader.batch_size}{ranks} with {size} {'examples' if units is None else 'users'}: expected at most "
                f"{size // world_size}. A step draws batch_size of them on average, so it cannot be more than there are. Lower the "
                f"loader's batch_size; DifferentialPrivacy(expected_batch_size={size}) takes all of them in every step."
            )
        if max_batch_size is not None and size < length:
            raise PreflightError(
                f"dataset_size={size} with max_batch_size={max_batch_size}: expected at least the dataset's length, of "
                "which draws above the bound are counted. Give a larger dataset_size, or leave out max_batch_size."
            )
        return plan(1.0 if noise_multiplier is None else noise_multiplier)

    def make() -> PrivacyPlan:
        made = plan(found() if noise_multiplier is None else noise_multiplier)
        check_distance_is_affordable(_ledger(made, spent))
        return made

    mine = on_every_rank(world, probe, PreflightError)
    check_same_on_every_rank(
        world,
        {
            "len(dataset)": len(loader.dataset),  # type: ignore[arg-type]  # preflight saw that it has a length
            "whose each example is (digest)": None if units is None else units.digest,
            "steps already charged": _ledger(mine, spent).steps,
            "the checkpoint's ledger": spent,
            **asdict(mine),
            "len(train_dataloader)": len(loader),  # an epoch: a rank with a shorter one would leave the others waiting
        },
    )
    return on_rank_zero(world, make)


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


def _ledger(plan: PrivacyPlan, spent: dict[str, Any] | None) -> Ledger:
    return Ledger.resume(plan, spent) if spent else Ledger(plan)


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
