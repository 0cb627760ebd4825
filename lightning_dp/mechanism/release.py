"""From the ranks' sums of clipped gradients to the noisy gradient that may be used and published."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from torch import Tensor

from lightning_dp.mechanism.adaptive import INDICATOR, adapted, in_force
from lightning_dp.mechanism.correlated import CorrelatedNoise
from lightning_dp.mechanism.discrete import DiscreteNoise
from lightning_dp.mechanism.gaussian import GaussianNoise
from lightning_dp.mechanism.noise import Noise, Parts, own_share
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.reduce import AllReduceSum, flatten, no_reduce, unflatten
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.plan.mechanism import Mechanism

Held = Callable[[Mapping[str, Tensor]], tuple[Parts, int]]
"""From a rank's sums to the parts of the flat sum that it holds, which are its own to write on, and P."""

Named = Callable[[Sequence[Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""From the totals of what was held to tensors by name, of the types of those given or of their shards."""


def as_one_vector(sums: Mapping[str, Tensor]) -> tuple[Parts, int]:
    """A rank's own sums whole: one part, a copy."""
    flat = flatten(sums)
    return [(0, flat)], flat.numel()


def from_one_vector(totals: Sequence[Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`as_one_vector`."""
    return unflatten(totals[0], like)


@dataclass(frozen=True)
class Collective:
    """How the sums of several ranks become one gradient; by default there is one rank.

    =================  ===========================  ============================  ==========================
    ranks              ``held``                     the noise is added            ``total``
    =================  ===========================  ============================  ==========================
    one                its sums                     to all of it                  nothing to add
    all-reduce         each its own sums            each to its share of its own  the sum, on every rank
    reduce-scatter     each its own sums            each to its share of its own  each its shards of the sum
    layer by layer     its shards of the sum        each to all that it holds     nothing to add any more
    =================  ===========================  ============================  ==========================

    Args:
        rank: this process's number among those that hold the same coordinates.
        size: how many these are: they divide the coordinates among themselves.
        held: what this rank holds of the flat sum. It may be a collective call.
        total: adds what is held up over the ranks, and gives every rank the sum or its part of it. Never a mean.
        named: from that to a gradient by name.
    """

    rank: int = 0
    size: int = 1
    held: Held = as_one_vector
    total: AllReduceSum = no_reduce
    named: Named = from_one_vector


class Released(NamedTuple):
    """What a release gives. All of it may be published.

    Args:
        gradient: by name, noisy and divided.
        state: what the mechanism carries to the next step.
        noise_std: the standard deviation of the noise on each coordinate of ``gradient``, as it was added in this step.
    """

    gradient: dict[str, Tensor]
    state: MechanismState
    noise_std: float


def release(
    sums: Mapping[str, Tensor],
    mechanism: Mechanism,
    key: RandomKey,
    step: int,
    collective: Collective = Collective(),  # frozen
    state: MechanismState = NOTHING,
    begun: int = 0,
) -> Released:
    """Turn the ranks' sums of clipped gradients into the one noisy gradient that may be used and published.

    The only place where noise is added, and where anything is divided. Each rank adds the noise of its own share of the
    coordinates, so the total holds the noise exactly once at any number of ranks, no rank waits for another's noise, and
    every rank ends up with the very same numbers. The only division is by the public expected batch size.

    Args:
        sums: this rank's sums of clipped gradients by name, in the accumulation type, or int64 for discrete noise. Left as
            they are. **Private.**
        mechanism: σ, C and the divisor. If C is adapted, it is that of ``state``, as it was for the sums.
        key: the run's key, the same on every rank.
        step: the number of the step in the run's life.
        collective: how the ranks' sums are added up.
        state: what the mechanism has carried here from the step before.
        begun: the number of the step with which noise that is correlated over the steps began.

    Returns:
        The gradient by name, what is carried to the next step, and how large the noise is.

    Raises:
        TypeError: a sum is of a type that the noise does not protect.
        RuntimeError: there are more coordinates than the mechanism accounts for.

    Guarantee:
        The Gaussian mechanism with noise multiplier σ on a sum of that L2 sensitivity, whatever the clipping style; (ε, δ) over
        steps by the ledger. With a ``resolution`` the noise is discrete, see
        :class:`lightning_dp.mechanism.discrete.DiscreteNoise`. With a ``correlation`` all the steps together are one Gaussian
        mechanism, see :class:`lightning_dp.mechanism.correlated.CorrelatedNoise`.
    """
    mechanism = in_force(mechanism, state)
    noise = noise_of(mechanism, begun)
    held, coordinates = collective.held(sums)
    block = noise.block(held[0][1].device)
    own = own_share(held, coordinates, collective.rank, collective.size, block)
    noise_std = noise.std(step, state) / mechanism.divisor
    state = noise.add(own, coordinates, key=key, step=step, state=state)
    totals = [noise.to_float(collective.total(part), mechanism.divisor) for _, part in held]
    gradient = collective.named(totals, noise.released(sums))
    if INDICATOR in gradient:
        state = adapted(gradient.pop(INDICATOR), mechanism, state)
    return Released(gradient, state, noise_std)


def noise_of(mechanism: Mechanism, begun: int = 0) -> Noise:
    """The noise of a mechanism: in floating point, perhaps correlated since step ``begun``, or on the integers of its grid."""
    sigma, units = mechanism.noise.noise_multiplier, mechanism.noise.resolution
    if mechanism.noise.correlation is not None:
        return CorrelatedNoise(mechanism.noise_std, mechanism.noise.correlation, begun)
    if units is None:
        return GaussianNoise(mechanism.noise_std)
    variance = Fraction(sigma) ** 2 * units**2
    return DiscreteNoise(variance, mechanism.sensitivity / units, mechanism.noise.coordinates or 0)
