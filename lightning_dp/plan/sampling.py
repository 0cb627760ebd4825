"""How a step's sample is drawn, as plain public numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_dp.validate import number, shown, whole

MOST_EXAMPLES = 10**15
"""Counts up to here are exact as floating-point numbers, and so is arithmetic with them."""

MOST_PARTICIPATIONS = 1000
"""Drawing them takes memory of as many numbers for each example, and time of the square."""
SamplingScheme = Literal["poisson", "cyclic_poisson", "random_allocation", "balls_in_bins"]
"""How a step's sample is drawn."""
IN_BLOCKS: tuple[SamplingScheme, ...] = ("random_allocation", "balls_in_bins")
"""Those in which each example is in exactly one step of a block."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a step's sample is drawn, and of how many examples.

    With ``"poisson"`` every example enters a step's sample independently with probability q = B / N. With
    ``"cyclic_poisson"`` every example is in one of b groups (:attr:`~lightning_dp.plan.mechanism.Mechanism.groups`), step t
    draws from group t mod b, and there every example enters independently with probability b·B / N.

    With the others steps come in blocks of k = N / B, a whole number, and every example is in exactly one step of a block, with
    the same probability in each and independently of all other examples: with ``"random_allocation"`` in a step that is drawn
    anew for each block, with ``"balls_in_bins"`` in the same one of all blocks. With ``participations`` t a block of random
    allocation has t·N / B steps, and every example is in exactly t of them, each t steps as likely as any others.

    Args:
        dataset_size: N, the public number of examples.
        expected_batch_size: B, the expected size of a step's sample over all ranks. ``0 < B <= N``.
        max_batch_size: M, the most examples that a step uses over all ranks: a larger draw is cut to a random part of
            this size (truncated Poisson sampling). ``None`` never cuts.
        scheme: the scheme's name, as the argument ``sampling`` of ``DifferentialPrivacy`` takes it.
        participations: t, in how many steps of a block an example is; above 1 for ``"random_allocation"`` alone.

    Raises:
        ValueError: a number is outside its range, or there is no such scheme.

    Example:
        >>> Sampling(1000, 100).probability
        0.1
    """

    dataset_size: int
    expected_batch_size: float
    max_batch_size: int | None = None
    scheme: SamplingScheme = "poisson"
    participations: int = 1

    def __post_init__(self) -> None:
        check_sampling(self.scheme)
        check_participations(self.participations, self.scheme)
        number("expected_batch_size", self.expected_batch_size)
        if whole("dataset_size", self.dataset_size, high=MOST_EXAMPLES) < 1:
            raise ValueError(
                f"dataset_size={self.dataset_size}: expected at least one example. "
                "Check that the training dataset is not empty."
            )
        q = self.probability
        if not 0 < q <= 1 or math.isinf(1 / q):  # so small that nothing can be computed with it
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} with dataset_size={self.dataset_size} gives a "
                f"sampling probability of {q:.4g}: expected a value in "
                "(0, 1]. Lower the loader's batch_size (it is multiplied by the number of ranks) or pass "
                f"DifferentialPrivacy(expected_batch_size=...) at most {self.dataset_size}."
            )
        if self.max_batch_size is not None:
            check_max_batch_size(self.max_batch_size)
        if self.scheme in IN_BLOCKS and abs(1 / q - round(1 / q)) > 1e-9 / q:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} with dataset_size={self.dataset_size} and "
                f"sampling={self.scheme!r}: expected a block of a whole number of steps, N / B. Give N / k for one of k steps, "
                f"such as {self.dataset_size / max(1, round(1 / q))}."
            )

    @property
    def probability(self) -> float:
        """Q = B / N."""
        return self.expected_batch_size / self.dataset_size

    @property
    def block(self) -> int:
        """k, of how many steps an example is in exactly :attr:`participations`; 1 where it may be in any."""
        return self.participations * round(1 / self.probability) if self.scheme in IN_BLOCKS else 1


def check_sampling(scheme: object) -> None:
    """Raise ``ValueError`` unless ``scheme`` is the name of a sampling scheme."""
    if not isinstance(scheme, str) or scheme not in get_args(SamplingScheme):
        names = ", ".join(map(repr, get_args(SamplingScheme)))
        unproved = isinstance(scheme, str) and scheme.replace("-", "_") == "b_min_sep"
        why = " No bound of b-min-sep sampling holds in both directions." if unproved else ""
        raise ValueError(f"sampling={shown(scheme)}: expected one of {names}.{why}")


def check_participations(participations: object, scheme: str) -> None:
    """Raise ``ValueError`` unless an example may be in so many steps of a block."""
    if whole("participations", participations, low=1, high=MOST_PARTICIPATIONS) > 1 and scheme != "random_allocation":
        raise ValueError(
            f"participations={participations} with sampling={scheme!r}: expected sampling='random_allocation', where an "
            "example is in exactly so many steps of a block. Elsewhere it takes part once, or as often as it is drawn."
        )


def block_of(sampling_probability: float) -> int:
    """1/q = k, how many steps a block has.

    Raises:
        ValueError: it is no whole number, to one part in a million.
    """
    check_sampling_probability(sampling_probability)
    exact = 1.0 / sampling_probability
    if math.isinf(exact) or abs(exact - round(exact)) > 1e-6 * exact:
        raise ValueError(
            f"sampling_probability={sampling_probability}: expected 1/k for blocks of k steps, with k a whole number, since "
            f"each example is in exactly one step of a block. Give 1/{max(1, round(min(exact, 1e15)))}."
        )
    return round(exact)


def check_max_batch_size(max_batch_size: int) -> None:
    """Raise ``ValueError`` unless ``max_batch_size`` is at least 1."""
    if whole("max_batch_size", max_batch_size) < 1:
        raise ValueError(
            f"max_batch_size={max_batch_size}: expected at least 1, well above the expected batch size, or None for draws "
            "of any size."
        )


def check_sampling_probability(sampling_probability: float) -> None:
    """Raise ``ValueError`` unless ``sampling_probability`` lies in (0, 1]."""
    if not 0 < number("sampling_probability", sampling_probability) <= 1:
        raise ValueError(
            f"sampling_probability={sampling_probability}: expected a number in (0, 1], "
            "the expected batch size divided by the dataset size."
        )
