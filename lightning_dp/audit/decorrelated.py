"""Correlated noise taken apart again by its strategy matrix, for whoever looks at it or attacks it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import toeplitz

from lightning_dp.audit.noise_law import Noised
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.toeplitz import inverse

Rows = npt.NDArray[np.float64]


def strategy(correlation: Correlation, steps: int) -> Rows:
    """The first ``steps`` rows and columns of C, with its largest column of length one."""
    column = np.zeros(max(steps, correlation.steps))
    column[: correlation.bands] = correlation.matrix[: len(column)]
    if correlation.of_inverse:
        column = inverse(column[: correlation.bands], len(column))
    column /= np.linalg.norm(column[: correlation.steps])
    return np.asarray(toeplitz(column[:steps], np.zeros(steps)))


def decorrelated(releases: list[Noised], correlation: Correlation | None) -> list[Noised]:
    """The same releases with C times their noise, which is independent noise of standard deviation σC.

    Args:
        releases: of a run from its first step on, one for each.
        correlation: C; with ``None`` they are left as they are.
    """
    if correlation is None:
        return releases
    rows = torch.from_numpy(strategy(correlation, len(releases)))
    found = []
    for step, release in enumerate(releases):
        noise = {
            name: torch.stack([rows[step, at] * releases[at].noise[name].double() for at in range(step + 1)]).sum(0)
            for name in release.noise
        }
        found.append(replace(release, noise=noise))
    return found


def score(released: Rows, correlation: Correlation, noise_multiplier: float, probability: float) -> Rows:
    """How much speaks for each canary, given what was released along its coordinate at every step.

    C times the releases has independent noise, and a turn at step t adds column t of C to it. What is found along that column
    has noise of σ², and 1 more with the turn, and the log of the ratio of the two likelihoods is added up over the steps. Where
    columns do not meet this is the best test for an attacker who does not know the groups.

    Args:
        released: ``(T, m)``, in units of C.
        correlation: of the noise.
        noise_multiplier: σ > 0.
        probability: q = B/N.

    Returns:
        ``(m,)``.
    """
    return decorrelated_score(
        strategy(correlation, len(released)) @ released, correlation, noise_multiplier, probability
    )


def decorrelated_score(noised: Rows, correlation: Correlation, noise_multiplier: float, probability: float) -> Rows:
    """:func:`score` of C times the releases, ``(T, m)``."""
    rows = strategy(correlation, len(noised))
    lengths = np.square(rows).sum(0)[:, None]
    z = (2.0 * (rows.T @ noised) / lengths - 1.0) * lengths / (2.0 * noise_multiplier**2)
    with np.errstate(divide="ignore"):
        found: Rows = np.logaddexp(np.log1p(-probability), np.log(probability) + z).sum(0)
    return found


def signal(released: Rows, correlation: Correlation) -> Rows:
    """What was found along the columns of C, added up: ``(m,)`` from ``(T, m)``, a Gaussian for a canary that is not in."""
    rows = strategy(correlation, len(released))
    found: Rows = (rows.T @ (rows @ released)).sum(0)
    return found
