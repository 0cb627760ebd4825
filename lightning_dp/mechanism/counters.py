"""Random numbers at counters: many at once, each a function of a seed and its own counter alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def splitmix64(seed: int, counters: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The outputs of SplitMix64 at these counters, in their shape: independent for every statistical purpose, not secret.

    Args:
        seed: 64 bits.
        counters: from 1.

    Example:
        >>> splitmix64(7, np.array([1, 2], dtype=np.uint64))[1] == splitmix64(7, np.array([2], dtype=np.uint64))[0]
        np.True_

    Source: G. L. Steele, D. Lea and C. H. Flood 2014, *Fast splittable pseudorandom number generators*, figure 16.
    """
    z = np.add(np.asarray([seed % 2**64], dtype=np.uint64), counters * GAMMA, dtype=np.uint64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
