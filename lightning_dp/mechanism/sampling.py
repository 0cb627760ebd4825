"""Which examples take part in a step: by Poisson sampling, or in one step of each block."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lightning_dp.mechanism.keystream import WORD_BITS, Keystream, LazyUniform

Steps = npt.NDArray[np.int64]


def poisson_sample(
    generator: np.random.Generator, dataset_size: int, sampling_probability: float
) -> npt.NDArray[np.int64]:
    """Draw every one of ``dataset_size`` examples independently with probability ``sampling_probability``.

    The size is drawn from Binomial(N, q), then a uniform subset of that size: the same law as N independent coins,
    at a cost that grows with the sample and not with N.

    Args:
        generator: source of randomness; the same generator state gives the same draw.
        dataset_size: N, the actual number of examples to draw from.
        sampling_probability: q in (0, 1].

    Returns:
        Sorted indices, shape ``(n,)`` with E[n] = q·N. ``n`` may be 0: an empty draw is a valid step.

    Guarantee:
        An example's membership is Bernoulli(q) and independent of every other's, which is what the accountant
        assumes (Mironov, Talwar, Zhang 2019, arXiv 1908.10530).

    Example:
        >>> len(poisson_sample(np.random.default_rng(0), 1000, 1.0))
        1000
    """
    size = int(generator.binomial(dataset_size, sampling_probability))
    drawn = generator.choice(dataset_size, size=size, replace=False, shuffle=False)
    return np.sort(drawn.astype(np.int64, copy=False))


def exact_poisson_sample(stream: Keystream, dataset_size: int, sampling_probability: float) -> npt.NDArray[np.int64]:
    """:func:`poisson_sample` from a cryptographic generator, with a coin of exactly q for every example.

    A word of 64 bits for each example is compared with q·2⁶⁴; where that does not decide, further bits do.

    Args:
        stream: uniform words; one for each example is taken.
        dataset_size: N, the actual number of examples to draw from.
        sampling_probability: q in (0, 1], taken as the rational number that it is.

    Returns:
        Sorted indices, shape ``(n,)``.

    Example:
        >>> len(exact_poisson_sample(Keystream(bytes(32)), 1000, 1.0))
        1000
    """
    threshold = Fraction(sampling_probability)
    words, scaled = stream.words(dataset_size), threshold * 2**WORD_BITS
    if scaled >= 2**WORD_BITS:
        return np.arange(dataset_size, dtype=np.int64)
    first = int(scaled)  # rounded down
    members = words < np.uint64(first)
    if scaled != first:
        for index in np.flatnonzero(words == np.uint64(first)):
            members[index] = LazyUniform(int(words[index]), stream.spare).below(threshold)
    return np.flatnonzero(members).astype(np.int64, copy=False)


def allocation(generator: np.random.Generator, dataset_size: int, block: int) -> npt.NDArray[np.int64]:
    """In which step of a block of ``block`` each of ``dataset_size`` examples is, ``(N,)``: uniform, and independent.

    Args:
        generator: source of randomness; the same generator state gives the same allocation.
        dataset_size: N, the actual number of examples.
        block: k, at least 1.

    Guarantee:
        An example is in exactly one step of the block, each with probability 1/k, independently of every other example. So
        the size of a step's sample is Binomial(N, 1/k) and no fixed number, and adding or removing an example moves nobody
        else, as the accountant assumes.

    Example:
        >>> bool((allocation(np.random.default_rng(0), 1000, 4) < 4).all())
        True

    Source: Feldman and Shenfeld 2025 (arXiv 2502.08202); Chua et al. 2024 (arXiv 2412.16802), Algorithm 3.
    """
    return generator.integers(block, size=dataset_size, dtype=np.int64)


def exact_allocation(stream: Keystream, dataset_size: int, block: int) -> npt.NDArray[np.int64]:
    """:func:`allocation` from a cryptographic generator, with probabilities of exactly 1/k.

    A word of 64 bits for each example; the few at the top that would favour some steps are drawn again.

    Example:
        >>> exact_allocation(Keystream(bytes(32)), 5, 1).tolist()
        [0, 0, 0, 0, 0]
    """
    words = stream.words(dataset_size).copy()
    fair = 2**WORD_BITS - 2**WORD_BITS % block
    while fair < 2**WORD_BITS and (again := np.flatnonzero(words >= np.uint64(fair))).size:
        words[again] = stream.spare.words(again.size)
    return (words % np.uint64(block)).astype(np.int64)


def distinct_steps(draw: Callable[[int], Steps], block: int, times: int) -> Steps:
    """In which ``times`` steps of a block each example is, ``(N, times)``: all different, and any as likely as any others.

    Args:
        draw: :func:`allocation` or :func:`exact_allocation` of all examples, to a block of as many steps as it is given; each
            call draws anew.
        block: k, at least ``times``.
        times: t. With 1 the one draw is what there is.

    Guarantee:
        A row is a uniformly random set of t of the k steps, independent of other rows: step j of the last t enters, unless it
        is drawn, in place of what was drawn before.

    Example:
        >>> generator = np.random.default_rng(0)
        >>> sorted(distinct_steps(lambda steps: allocation(generator, 1, steps), 3, 3)[0].tolist())
        [0, 1, 2]

    Source: R. Floyd in J. Bentley, *Programming pearls: a sample of brilliance*, CACM 1987.
    """
    columns: list[Steps] = []
    for last in range(block - times, block):
        drawn = draw(last + 1)
        again = np.zeros(len(drawn), dtype=bool)
        for column in columns:
            again |= column == drawn
        columns.append(np.where(again, last, drawn))
    return np.stack(columns, axis=1)


def cut(generator: np.random.Generator, drawn: npt.NDArray[np.int64], max_batch_size: int) -> npt.NDArray[np.int64]:
    """At most ``max_batch_size`` of the drawn indices, sorted: all of them, or a uniformly random part.

    Args:
        generator: source of randomness. It must not depend on the data.
        drawn: indices, ``(n,)``, a whole draw over all ranks.
        max_batch_size: M ≥ 1.

    Guarantee:
        A draw of at most M examples is left as it is, so a run differs from one with plain Poisson sampling with at most
        the probability that some draw exceeds M (:func:`lightning_dp.accounting.slack.truncation_probability`).

    Example:
        >>> len(cut(np.random.default_rng(0), np.arange(10), 4)), len(cut(np.random.default_rng(0), np.arange(3), 4))
        (4, 3)

    Source: Chua et al. 2024 (arXiv 2411.04205), truncated Poisson batches.
    """
    if len(drawn) <= max_batch_size:
        return drawn
    return np.sort(generator.choice(drawn, size=max_batch_size, replace=False, shuffle=False))


def rank_slice(indices: npt.NDArray[np.int64], rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Rank ``rank``'s part of the one global draw: every ``world_size``-th index.

    The slices of all ranks are disjoint and together are the draw, so an example is processed exactly once.
    """
    return indices[rank::world_size]
