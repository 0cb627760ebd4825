"""How far data may stray from a law before a test rejects it, and the numbers that say so."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats
from torch import Tensor

from lightning_dp.mechanism import release as release_module
from lightning_dp.mechanism.gaussian import add_gaussian_noise, block_on
from lightning_dp.mechanism.noise import BLOCK, own_share
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import Collective
from lightning_dp.plan.privacy_plan import PrivacyPlan

FALSE_ALARM = 1e-6  # a right law is rejected by a check this rarely ...
CAUGHT = 1e-12  # ... and a planted wrong one must look at least this unlikely


def plan(**fields: Any) -> PrivacyPlan:
    """A plan in which every number is different from every other, so that none can stand in for another."""
    given = {
        "noise_multiplier": 1.5,
        "clip_norm": 0.8,
        "delta": 1e-5,
        "dataset_size": 40,
        "expected_batch_size": 7,
    }
    return PrivacyPlan(**{**given, **fields})


def noised(total: Tensor, *, noise_std: float, key: RandomKey, step: int, rank: int = 0, world_size: int = 1) -> Tensor:
    """``total`` with the noise of a rank's share of its coordinates, in place."""
    coordinates = total.numel()
    own = own_share([(0, total)], coordinates, rank, world_size, block_on(total.device))
    add_gaussian_noise(own, coordinates, noise_std=noise_std, key=key, step=step)
    return total


def release(sums: Any, plan: PrivacyPlan, key: RandomKey, step: int, **collective: Any) -> dict[str, Tensor]:
    """The gradient of a release by the mechanism of a plan, to which the noise carries nothing."""
    released = release_module.release(sums, plan.mechanism, key, step, Collective(**collective))
    assert released.state == release_module.NOTHING
    return released.gradient


def two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def standard_normal_p_values(sample: npt.ArrayLike) -> dict[str, float]:
    """How likely ``sample`` is under independent N(0, 1): shape, mean, variance, correlation and tails."""
    x = np.asarray(sample, dtype=np.float64).ravel()
    n = len(x)
    lags = np.array([x[:-lag] @ x[lag:] / np.sqrt(n - lag) for lag in range(1, 33)])
    square = float(x @ x)
    return {
        "shape (Kolmogorov-Smirnov)": float(stats.kstest(x, "norm").pvalue),
        "mean": two_sided(x.mean() * np.sqrt(n)),
        "variance": 2 * min(float(stats.chi2.cdf(square, n)), float(stats.chi2.sf(square, n))),
        "correlation with neighbours": float(stats.chi2.sf(lags @ lags, len(lags))),
        "beyond 3": float(stats.binomtest(int((np.abs(x) > 3).sum()), n, two_sided(3)).pvalue),
        "beyond 4": float(stats.binomtest(int((np.abs(x) > 4).sum()), n, two_sided(4)).pvalue),
    }


def noise_p_values(noise: npt.ArrayLike) -> dict[str, float]:
    """How likely a step's noise is, in units of σC: as a whole, block of coordinates by block, and between blocks."""
    x = np.asarray(noise, dtype=np.float64).ravel()
    blocks = x[: len(x) // BLOCK * BLOCK].reshape(-1, BLOCK)
    p_values = {**standard_normal_p_values(x), **independence_p_values(blocks)}
    for place, block in enumerate(blocks):
        p_values[f"block {place}"] = len(blocks) * min(standard_normal_p_values(block).values())
    return p_values


def independence_p_values(rows: npt.ArrayLike) -> dict[str, float]:
    """How likely it is that the rows, each of independent N(0, 1) numbers, have nothing to do with each other."""
    x = np.asarray(rows, dtype=np.float64)
    z = (x @ x.T / np.sqrt(x.shape[1]))[np.triu_indices(len(x), 1)]
    return {
        "closest pair": min(1.0, len(z) * two_sided(np.abs(z).max())),
        "all pairs": float(stats.chi2.sf(z @ z, len(z))),
    }


def poisson_sampling_p_values(members: npt.NDArray[np.bool_], q: float) -> dict[str, float]:
    """How likely it is that each entry of ``members`` (draws, examples) is an independent coin of probability q."""
    draws, examples = members.shape
    inclusion = (members.sum(0) - draws * q) / np.sqrt(draws * q * (1 - q))
    coins = (members - q) / np.sqrt(q * (1 - q))
    pairs = (coins.T @ coins / np.sqrt(draws))[np.triu_indices(examples, 1)]
    total = stats.binomtest(int(members.sum()), draws * examples, q).pvalue
    lags = np.array([(coins[:-lag] * coins[lag:]).sum() / np.sqrt(coins[lag:].size) for lag in range(1, 9)])
    return {
        "every example's frequency": float(stats.chi2.sf(inclusion @ inclusion, examples)),
        "mean size": float(total),
        "size is binomial": binomial_p_value(members.sum(1), examples, q),
        "pairwise independence": min(1.0, len(pairs) * two_sided(np.abs(pairs).max())),
        "pairs taken together": two_sided(pairs.sum() / np.sqrt(len(pairs))),
        "steps shortly after each other": float(stats.chi2.sf(lags @ lags, len(lags))),
    }


def binomial_p_value(counts: npt.NDArray[np.int64], n: int, q: float) -> float:
    """Pearson's chi-square of ``counts`` against Binomial(n, q), with rare values pooled at both ends."""
    expected = stats.binom.pmf(np.arange(n + 1), n, q) * len(counts)
    low, high = np.flatnonzero(expected >= 10)[[0, -1]]
    observed = np.bincount(np.clip(counts, low, high), minlength=high + 1)[low : high + 1]
    pooled = expected[low : high + 1].copy()
    pooled[0] += expected[:low].sum()
    pooled[-1] += expected[high + 1 :].sum()
    return float(stats.chisquare(observed, pooled * observed.sum() / pooled.sum()).pvalue)
