"""Cyclic Poisson sampling: every example is in one of b groups, and a step draws from the group whose turn it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import poisson_sample


def groups_of(key: RandomKey, dataset_size: int, groups: int) -> list[npt.NDArray[np.int64]]:
    """The examples of each group: every example's group is one of b at random, whatever the other examples are.

    So an example that is added or taken away moves no other to another group. Groups differ in size as coins do, and a step's
    expected batch is B on average over the partition.

    Args:
        key: of the run, which makes the partition too.
        dataset_size: N, the actual number of examples.
        groups: b.

    Returns:
        For each group the indices of its examples, sorted; an index is in exactly one.

    Example:
        >>> groups = groups_of(RandomKey.from_seed(0), 1000, 4)
        >>> sorted(np.concatenate(groups).tolist()) == list(range(1000))
        True
    """
    of = key.generator(Stream.GROUPS).integers(groups, size=dataset_size)
    order = np.argsort(of, kind="stable").astype(np.int64, copy=False)
    return np.split(order, np.searchsorted(of[order], np.arange(1, groups)))


def cyclic_poisson_sample(
    key: RandomKey, groups: list[npt.NDArray[np.int64]], step: int, probability: float
) -> npt.NDArray[np.int64]:
    """Draw each example of the step's group, ``step mod b``, independently with the same probability; no other example.

    Args:
        key: of the run; its SAMPLING stream at ``step`` is used.
        groups: of :func:`groups_of`.
        step: its number.
        probability: b·B/N, in (0, 1].

    Returns:
        Sorted indices, ``(n,)``, with E[n] = B over the partition. ``n`` may be 0.

    Guarantee:
        Of b consecutive steps an example takes part in at most one, always the same one, and there with ``probability``,
        independently of everybody and of its other turns.

    Source: Choquette-Choo et al. 2023 (arXiv 2306.08153), Theorem 4 and the sampling that it is for.
    """
    members = groups[step % len(groups)]
    return np.sort(members[poisson_sample(key.generator(Stream.SAMPLING, step), len(members), probability)])
