"""A run of identical rounds of DP-SGD, the unit in which spent privacy is counted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from lightning_dp.accounting.binomial import at_least
from lightning_dp.plan.correlation import MOST_STEPS as MOST_ROWS
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.mechanism import Mechanism, check_noise_multiplier
from lightning_dp.plan.privacy_plan import MOST_STEPS
from lightning_dp.plan.sampling import IN_BLOCKS, SamplingScheme, block_of, check_sampling_probability
from lightning_dp.validate import whole

Law = Literal["poisson", "allocation", "bins"]
"""What is composed: a step whose sample each example enters with probability q, or a block of 1/q steps of which each example
is in exactly one, with the same probability in each and independently of all others and of other blocks;
or a stretch of blocks with the same step in each, under noise that is correlated over the steps."""


class Seldom(NamedTuple):
    """With this probability, seen by everybody, a round is that of these other numbers, which protect less.

    Args:
        probability: of such a round, independently of all others and of the example.
        noise_multiplier: σ of it.
        sampling_probability: q of it.
    """

    probability: float
    noise_multiplier: float
    sampling_probability: float


@dataclass(frozen=True, slots=True)
class Phase:
    """``steps`` identical rounds with Gaussian noise, independent of each other.

    Args:
        noise_multiplier: σ, the noise's standard deviation in units of the clip norm. 0 means no noise.
        sampling_probability: q, the probability with which each example enters a step's sample.
        steps: how many rounds were (or will be) taken: steps with the law ``"poisson"``, blocks with ``"allocation"``,
            stretches with ``"bins"``.
        law: what a round is.
        correlation: of the noise, with the law ``"bins"``. σ is then in units of the largest norm of a column of C, too.
        blocks: of how many blocks each stretch is, with the law ``"bins"``.
        seldom: what a step with Poisson sampling is now and then instead, or ``None``.

    Raises:
        ValueError: σ is negative or not finite, q is outside (0, 1], or ``steps`` is negative; or with an allocation 1/q is
            no whole number.

    Example:
        >>> Phase(noise_multiplier=3.0, sampling_probability=4096 / 50000, steps=875).steps
        875
    """

    noise_multiplier: float
    sampling_probability: float
    steps: int
    law: Law = "poisson"
    correlation: Correlation | None = field(default=None, repr=False)
    blocks: int = field(default=0, repr=False)
    seldom: Seldom | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_noise_multiplier(self.noise_multiplier)
        check_sampling_probability(self.sampling_probability)
        if whole("steps", self.steps, high=MOST_STEPS) < 0:
            raise ValueError(f"steps={self.steps}: expected a non-negative number. Count the steps that were taken.")
        if self.law != "poisson":
            block_of(self.sampling_probability)


def phase_of(mechanism: Mechanism, steps: int) -> Phase:
    """What the accountants compose for ``steps`` steps of ``mechanism`` whose randomness began with the first of them.

    Everything that counts privacy comes through here: the ledger's past, its curve, calibration and the planner. Where
    :attr:`~lightning_dp.plan.mechanism.Mechanism.memoryless` is false, what is composed need not be a step, and a part of a
    round counts as the whole: a release less is post-processing of all of them.

    Guarantee:
        ε of the phase bounds that of the first ``steps`` steps under :attr:`Mechanism.neighbouring_relation`, and never falls
        as ``steps`` grows.

    Example:
        >>> from lightning_dp.plan.mechanism import Mechanism
        >>> step = Mechanism.of(noise_multiplier=3.0, clip_norm=1.0, dataset_size=1000, expected_batch_size=100)
        >>> phase_of(step, 50)
        Phase(noise_multiplier=3.0, sampling_probability=0.1, steps=50, law='poisson')
        >>> phase_of(step.but(sampling="random_allocation"), 42)
        Phase(noise_multiplier=3.0, sampling_probability=0.1, steps=5, law='allocation')

    With cyclic Poisson sampling in b groups and noise correlated by a strategy matrix C:

    | C | composed for t steps | because |
    |---|---|---|
    | b bands | ⌈t/b⌉ steps of σ at b·B/N | columns of an example's turns do not meet: each turn is a release of its own |
    | C⁻¹ has bands | 1 step of σ·‖C[:, 0]‖/S(t) at 1 | S(t) is how far all turns move C·G, whoever is drawn |

    With balls in bins a stretch of ⌈t/k⌉ blocks is composed, whatever C is: :mod:`lightning_dp.accounting.mixture`.

    σ is in units of C's largest column norm times the clip norm, so that σ says how much noise one turn meets under both.

    Source: Choquette-Choo et al. 2023 (arXiv 2306.08153), Theorem 4; Denisov et al. 2022 (arXiv 2202.08312), Theorem 2.1.
    """
    sigma, q = mechanism.event()
    correlation = mechanism.noise.correlation
    if correlation is None:
        scheme, participations = mechanism.sampling.scheme, mechanism.sampling.participations
        phase = phase_of_numbers(sigma, q, steps, scheme, participations)
        return phase if phase.law != "poisson" else replace(phase, seldom=_where_draws_are_cut(mechanism))
    if mechanism.sampling.scheme in IN_BLOCKS:
        return _phase_of_bins(correlation, sigma, q, steps)
    if not correlation.of_inverse:
        groups = mechanism.groups
        return Phase(sigma, min(1.0, groups * q), -(-steps // groups))
    if steps > MOST_ROWS:
        return Phase(0.0, 1.0, 1)  # no bound at all: more rows than anybody computes a sensitivity of
    moved = correlation.sensitivity(max(1, steps), mechanism.groups)
    return Phase(sigma * correlation.column_norm / moved, 1.0, min(1, steps))


def _phase_of_bins(correlation: Correlation, sigma: float, q: float, steps: int) -> Phase:
    bins = block_of(q)
    blocks = -(-steps // bins)
    if blocks * bins > MOST_ROWS:
        return Phase(0.0, 1.0, 1)
    phase = Phase(sigma, q, min(1, blocks), "bins", correlation, max(1, blocks))
    return phase if bins > 1 else as_known(phase)


def as_known(phase: Phase) -> Phase:
    """``phase`` as if everybody knew in which steps the example may be: the Gaussian mechanism, and never less privacy loss.

    For steps with Poisson sampling, whose moments are computed, it is the phase itself.
    """
    if phase.law == "poisson":
        return phase
    sigma = phase.noise_multiplier
    if phase.correlation is not None:
        bins = block_of(phase.sampling_probability)
        sigma *= phase.correlation.column_norm / phase.correlation.sensitivity(phase.blocks * bins, bins)
    return Phase(sigma, 1.0, phase.steps)


def _where_draws_are_cut(mechanism: Mechanism) -> Seldom | None:
    """What a step is where so many others are drawn that the example would displace one of them.

    Let A be the draw of all others, and let |A| ≥ M, which has probability τ = P[Binomial(N, q) ≥ M] at most and is
    independent of the example's own coin. Without the example a uniformly random part of M of A is used. With it, and if it is
    drawn and kept, which has probability q·M/(|A| + 1), it takes the place of a uniformly random one of such a part: the sum
    moves by g - g', at most 2C. So, with |A|, the part and the displaced one told to everybody, the step is a
    Poisson-subsampled Gaussian mechanism of sensitivity 2C, that is σ/2, and at most q; with fewer others nothing is cut, and
    it is that of σ and q.

    The same case as in A. Ganesh, *Tighter privacy analysis for truncated Poisson sampling* (arXiv 2508.15089), with what is
    told to everybody chosen for add/remove, where the dataset without the example has no one in its place.
    """
    sampling, (sigma, q) = mechanism.sampling, mechanism.event()
    if sampling.max_batch_size is None:
        return None
    probability = at_least(sampling.dataset_size, q, sampling.max_batch_size)
    return Seldom(probability, sigma / 2.0, q) if probability > 0.0 else None


def phase_of_numbers(
    noise_multiplier: float,
    sampling_probability: float,
    steps: int,
    sampling: SamplingScheme = "poisson",
    participations: int = 1,
) -> Phase:
    """:func:`phase_of` steps of which no more than this is known.

    With ``"random_allocation"`` the blocks are composed. With ``"balls_in_bins"`` an example is in the same step of each block,
    so that n blocks tell as much of it as one with noise σ/√n: the mean of their outputs is all that matters.

    An example that is in t random steps of a block of tk counts as one that is in one step of each of t blocks of k. Put the tk
    steps into t groups of k at random and draw one step of each group: that gives each t steps with the same probability. So
    the likelihood ratio S of the block is the mean, over how the steps are grouped, of products of t independent ratios
    that belong to one step of k. Under Q all these products have one law, so S is less spread than any of them (Jensen).

    Raises:
        ValueError: as of :class:`Phase`.
    """
    if sampling == "poisson":
        return Phase(noise_multiplier, sampling_probability, steps)
    if sampling not in IN_BLOCKS:
        raise ValueError(f"sampling={sampling!r}: expected one of 'poisson', {', '.join(map(repr, IN_BLOCKS))}.")
    blocks = participations * -(-steps // (participations * block_of(sampling_probability)))
    if sampling == "random_allocation" or blocks == 0:
        return Phase(noise_multiplier, sampling_probability, blocks, "allocation")
    return Phase(noise_multiplier / math.sqrt(blocks), sampling_probability, 1, "allocation")


def phases_of(
    noise_multipliers: Sequence[float],
    sampling_probabilities: Sequence[float],
    steps: Sequence[int],
    sampling: SamplingScheme = "poisson",
) -> tuple[Phase, ...]:
    """The phases of a plan whose σ, q or both change: the i-th numbers belong together, a single one to all phases.

    Raises:
        ValueError: there are neither one nor as many numbers of a kind as of the others.

    Example:
        >>> [phase.noise_multiplier for phase in phases_of([1.0, 2.0], [0.1], [30, 40])]
        [1.0, 2.0]
    """
    given = {"noise_multiplier": noise_multipliers, "sampling_probability": sampling_probabilities, "steps": steps}
    count = max(len(values) for values in given.values())
    for name, values in given.items():
        if len(values) not in (1, count):
            raise ValueError(
                f"{name}={' '.join(map(str, values))}: expected one number, or {count}, one for each phase. Give every phase "
                "its own."
            )
    whole = [list(values) * (count if len(values) == 1 else 1) for values in given.values()]
    return tuple(
        phase_of_numbers(float(sigma), float(q), int(taken), sampling) for sigma, q, taken in zip(*whole, strict=True)
    )


def merge_phases(phases: Iterable[Phase]) -> tuple[Phase, ...]:
    """Join neighbouring phases of equal σ and q, and leave out those without steps.

    Example:
        >>> merge_phases([Phase(1.0, 0.1, 3), Phase(1.0, 0.1, 4), Phase(2.0, 0.1, 0)])
        (Phase(noise_multiplier=1.0, sampling_probability=0.1, steps=7, law='poisson'),)
    """
    merged: list[Phase] = []
    for phase in phases:
        if phase.steps == 0:
            continue
        last = merged[-1] if merged else None
        if last is not None and same_mechanism(last, phase):
            merged[-1] = replace(last, steps=last.steps + phase.steps)
        else:
            merged.append(phase)
    return tuple(merged)


def same_mechanism(a: Phase, b: Phase) -> bool:
    """Whether one round of ``a`` and one of ``b`` have the same privacy loss (equal σ, q and law)."""
    return replace(a, steps=0) == replace(b, steps=0)


def with_noise(phases: Sequence[Phase], factor: float) -> list[Phase]:
    """The same rounds with noise ``factor`` times as large.

    Example:
        >>> with_noise([Phase(2.0, 0.1, 5)], 1.5)[0].noise_multiplier
        3.0
    """
    return [
        replace(
            phase,
            noise_multiplier=phase.noise_multiplier * factor,
            seldom=phase.seldom and phase.seldom._replace(noise_multiplier=phase.seldom.noise_multiplier * factor),
        )
        for phase in phases
    ]
