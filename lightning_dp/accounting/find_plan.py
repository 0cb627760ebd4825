"""The plan of a run, from the numbers asked for, what is spent and what is known of the data: arithmetic and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_dp.accounting.amplified import MOST_BINS, USUAL_EPSILON, amplified_lambda
from lightning_dp.accounting.calibrate import noise_for, noise_for_risk
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.limits import check_slack_is_affordable
from lightning_dp.accounting.phase import Phase, phase_of
from lightning_dp.accounting.reserve import noise_with_reserve
from lightning_dp.accounting.slack import Slack
from lightning_dp.accounting.target import RiskTarget
from lightning_dp.errors import PreflightError
from lightning_dp.plan.clipping import Clipping
from lightning_dp.plan.correlation import DEFAULT_BANDS, INDEPENDENT, Correlation, NoiseStyle
from lightning_dp.plan.filtering import GradientFilter
from lightning_dp.plan.mechanism import ADD_REMOVE, EXAMPLE, Adjacency, Mechanism, NoiseScale
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.plan.sampling import IN_BLOCKS, Sampling, SamplingScheme


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The privacy numbers that a user asks for; ``None`` for those to be found.

    Args:
        delta: δ.
        clipping: C and how it is kept.
        epsilon: target ε, or ``None``.
        noise_multiplier: σ, or ``None`` to have it found for ``epsilon``.
        expected_batch_size: B over all ranks, or ``None`` for the loader's ``batch_size`` × ranks.
        dataset_size: N, of examples or of other privacy units, or ``None`` for as many as there are.
        max_batch_size: M, or ``None`` for draws of any size.
        resolution: Δ, the clip norm in units of the grid of discrete noise, or ``None`` for noise in floating point.
        coordinates: P, how many trainable coordinates there are; needed with ``resolution``.
        sampling: how samples are drawn. In blocks of k steps B is made N/k, with the smallest k that keeps it at most what is
            asked for.
        participations: t, in how many steps of a block of t·k an example is.
        noise: how noise is correlated over the steps.
        noise_bands: how many bands the strategy matrix, or its inverse, has.
        noise_momentum: β of the workload that the matrix is found for.
        risk: what may be risked, in place of ``epsilon``. The plan's target is then the ε, at ``delta``, of as many of the
            planned steps as keep it.
        filter: what is between release and optimizer, or ``None``.
        adjacency: between which data sets the guarantee is to hold.
    """

    delta: float
    clipping: Clipping
    epsilon: float | None = None
    noise_multiplier: float | None = None
    expected_batch_size: int | None = None
    dataset_size: int | None = None
    max_batch_size: int | None = None
    resolution: int | None = None
    coordinates: int | None = None
    sampling: SamplingScheme = "poisson"
    participations: int = 1
    noise: NoiseStyle = "independent"
    noise_bands: int = DEFAULT_BANDS
    noise_momentum: float = 0.0
    risk: RiskTarget | None = None
    filter: GradientFilter | None = None
    adjacency: Adjacency = ADD_REMOVE


@dataclass(frozen=True, kw_only=True)
class Known:
    """What loader and Trainer tell of a run.

    Args:
        length: how many examples, or other privacy units, the dataset has.
        batch_size: the loader's; ``None`` counts as 1.
        remaining_steps: how many further steps this ``fit`` will take, or ``None`` if nobody knows.
        ranks: how many processes draw a ``batch_size`` each.
        unit: what ``length`` counts.
    """

    length: int
    batch_size: int | None
    remaining_steps: int | None
    ranks: int = 1
    unit: str = EXAMPLE


def find_plan(wanted: Wanted, known: Known, spent: Mapping[str, Any] | None = None) -> PrivacyPlan:
    """The plan of the steps to come.

    Args:
        wanted: the numbers asked for.
        known: of the data and the end of the run.
        spent: the state of a ledger that the run continues, or ``None``.

    Raises:
        PreflightError: the number of steps is unknown although σ must be found, or sizes do not go together.
        ValueError: a number is out of range, no σ reaches ε, or ``spent`` is not the state of a ledger.

    Example:
        >>> wanted = Wanted(epsilon=8.0, delta=1e-5, clipping=Clipping(1.0), expected_batch_size=4096)
        >>> plan = find_plan(wanted, Known(length=50_000, batch_size=512, remaining_steps=875))
        >>> round(plan.noise_multiplier, 2), plan.sampling_probability, plan.steps
        (1.64, 0.08192, 875)
    """
    return with_noise(before_noise(wanted, known, spent), wanted, spent)


def before_noise(wanted: Wanted, known: Known, spent: Mapping[str, Any] | None) -> PrivacyPlan:
    """All of :func:`find_plan` that takes no search: where σ is to be found, it is 1 for now. Quick, so every rank does it."""
    size = known.length if wanted.dataset_size is None else wanted.dataset_size
    batch: float | None = wanted.expected_batch_size
    if batch is None:
        batch = (known.batch_size or 1) * known.ranks
        if batch > size > 0:
            ranks = "" if known.ranks == 1 else f" on each of {known.ranks} ranks"
            raise PreflightError(
                f"batch_size={known.batch_size}{ranks} with {size} {'examples' if known.unit == EXAMPLE else 'users'}: "
                f"expected at most {size // known.ranks}. A step draws batch_size of them on average, so it cannot be more "
                f"than there are. Lower the loader's batch_size; DifferentialPrivacy(expected_batch_size={size}) takes all of "
                "them in every step."
            )
    if wanted.max_batch_size is not None and size < known.length:
        raise PreflightError(
            f"dataset_size={size} with max_batch_size={wanted.max_batch_size}: expected at least the dataset's length, of "
            "which draws above the bound are counted. Give a larger dataset_size, or leave out max_batch_size."
        )
    if wanted.sampling in IN_BLOCKS and 0 < batch <= size:
        batch = size / math.ceil(size / batch)
    sigma = 1.0 if wanted.noise_multiplier is None else wanted.noise_multiplier
    mechanism = Mechanism(
        Sampling(size, batch, wanted.max_batch_size),
        wanted.clipping,
        NoiseScale(sigma, wanted.resolution, wanted.coordinates),
        known.unit,
        wanted.filter,
        wanted.adjacency,
    )
    plan = PrivacyPlan(mechanism, delta=wanted.delta, target_epsilon=wanted.epsilon)
    before = ledger_of(plan, spent)
    if known.remaining_steps is not None:
        plan = plan.but(steps=before.steps + known.remaining_steps)
    noise = _correlation(wanted, plan, before.last)
    return plan.but(sampling=wanted.sampling, participations=wanted.participations, noise=noise)


def with_noise(plan: PrivacyPlan, wanted: Wanted, spent: Mapping[str, Any] | None) -> PrivacyPlan:
    """The plan of :func:`before_noise` with the σ that reaches the target ε, if it was not given. A search: seconds."""
    if wanted.noise_multiplier is None:
        plan = plan.but(noise_multiplier=_found(plan, wanted.risk, spent))
    if wanted.risk is not None:
        plan = plan.but(target_epsilon=_as_epsilon(wanted.risk, ledger_of(plan, spent)))
    check_slack_is_affordable(ledger_of(plan, spent))
    return plan


def ledger_of(plan: PrivacyPlan, spent: Mapping[str, Any] | None) -> Ledger:
    """The ledger of ``plan``'s steps after those that are spent."""
    return Ledger.resume(plan, spent) if spent else Ledger(plan)


def _as_epsilon(risk: RiskTarget, ledger: Ledger) -> float:
    """ε of as many of the planned steps as keep the risk: whoever stops there, stops before more is risked."""
    most = ledger.plan.steps or ledger.steps

    def holds(steps: int) -> bool:
        return risk.holds(ledger.phases_after(steps), ledger.slack(steps).total_variation)

    if not holds(most):
        fails, most = most, ledger.steps
        if not holds(most):
            raise ValueError(
                f"{risk}: the {most} steps already taken risk more. Expected a target above that. Raise {risk.name}."
            )
        while fails - most > 1:
            middle = (fails + most) // 2
            fails, most = (fails, middle) if holds(middle) else (middle, most)
    epsilon = ledger.epsilon(most).epsilon
    if not 0.0 < epsilon < math.inf:
        raise ValueError(
            f"{risk} with delta={ledger.plan.delta:g}: ε of the planned steps is {epsilon:g} at this δ, which tells nobody "
            "when to stop. Expected a smaller delta and at least one step. Lower delta."
        )
    return epsilon


def _found(plan: PrivacyPlan, risk: RiskTarget | None, spent: Mapping[str, Any] | None) -> float:
    epsilon, history = plan.target_epsilon, ledger_of(plan, spent)
    if epsilon is None and risk is None:
        raise ValueError("epsilon=None, noise_multiplier=None: expected one of them.")
    if plan.steps is None:
        raise PreflightError(
            f"{risk or f'epsilon={epsilon}'} without an end: expected Trainer(max_steps=...) or Trainer(max_epochs=...). The "
            "noise is found for a planned number of steps; training may still stop earlier, for instance by max_time."
        )
    last, remaining = history.last, plan.steps - history.steps
    if last is not None and (_drawn_alike(last, plan.mechanism) or remaining == 0):
        return last.noise.noise_multiplier  # go on as before; the ledger stops the run before it overspends
    more, phases = max(remaining, 1), history.phases
    ideal = plan.mechanism.but(resolution=None, coordinates=None)  # whatever σ is tried

    def phase(sigma: float) -> Phase:
        return phase_of(ideal.but(noise_multiplier=sigma), more)

    def slack(sigma: float) -> Slack:
        return ledger_of(plan.but(noise_multiplier=sigma), spent).slack(history.steps + more)

    if risk is not None:
        return noise_for_risk(risk, phase, phases, lambda sigma: slack(sigma).total_variation)
    assert epsilon is not None
    return noise_with_reserve(lambda left: noise_for(epsilon, left, phase, history=phases), epsilon, plan.delta, slack)


def _correlation(wanted: Wanted, plan: PrivacyPlan, last: Mechanism | None) -> str:
    """The strategy matrix asked for, as it is written; that of the steps before, if it is the same."""
    if wanted.noise == INDEPENDENT:
        return INDEPENDENT
    if plan.steps is None:
        raise PreflightError(
            f"noise={wanted.noise!r} without an end: expected Trainer(max_steps=...) or Trainer(max_epochs=...). The strategy "
            "matrix is found for a planned number of steps; training may still stop earlier, for instance by max_time."
        )
    steps, bands, momentum = (
        max(1, plan.steps),
        2 if wanted.noise == "lambda" else wanted.noise_bands,
        wanted.noise_momentum,
    )
    before = None if last is None else last.noise.correlation
    if before is not None and (before.style, before.steps, before.momentum, before.bands) == (
        wanted.noise,
        steps,
        momentum,
        bands,
    ):
        return str(before)  # found on another machine, it may differ in its last digits
    if wanted.noise == "lambda" and wanted.sampling in IN_BLOCKS:
        bins = round(plan.dataset_size / plan.expected_batch_size)
        if 1 < bins <= MOST_BINS:
            share = amplified_lambda(steps, bins, momentum, wanted.epsilon or USUAL_EPSILON, wanted.delta)
            return str(Correlation("lambda", steps, momentum, (1.0, -share)))
    apart = max(1, int(plan.dataset_size // plan.expected_batch_size))
    return str(Correlation.found(wanted.noise, steps=steps, momentum=momentum, groups=apart, bands=bands))


def _drawn_alike(a: Mechanism, b: Mechanism) -> bool:
    return (a.sampling.scheme, a.sampling.probability, a.noise.correlation) == (
        b.sampling.scheme,
        b.sampling.probability,
        b.noise.correlation,
    )
