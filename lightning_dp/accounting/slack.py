"""How far the mechanism as it runs is from the one that the accountant composes, in total variation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dp.accounting.binomial import at_least
from lightning_dp.plan.mechanism import Mechanism

_ROUNDING = 1.0 + 1e-9


@dataclass(frozen=True, slots=True)
class Slack:
    """A bound on the distance between a run and its ideal, as two sums over the run's steps.

    The ideal is the Poisson-subsampled Gaussian mechanism in real numbers. A run differs from it where a draw is cut
    to ``max_batch_size``, and where noise is discrete. If for every dataset the run's law is within total variation τ
    of the ideal's, and the ideal is (ε, δ')-private, then for neighbours D and D' and every event E

        P[run(D) ∈ E] ≤ P[ideal(D) ∈ E] + τ ≤ e^ε P[ideal(D') ∈ E] + δ' + τ ≤ e^ε P[run(D') ∈ E] + δ' + (1 + e^ε) τ,

    so the run is (ε, δ' + (1 + e^ε)τ)-private.

    Args:
        truncation: sum over the steps of the probability that the step's draw is cut.
        divergence: sum over the steps of the Kullback-Leibler divergence of the noise as drawn from its ideal.

    Example:
        >>> Slack(1e-9, 0.0) * 3 + Slack(0.0, 2e-18)
        Slack(truncation=3.0000000000000004e-09, divergence=2e-18)
    """

    truncation: float = 0.0
    divergence: float = 0.0

    def __add__(self, other: Slack) -> Slack:
        return Slack(self.truncation + other.truncation, self.divergence + other.divergence)

    def __mul__(self, steps: int) -> Slack:
        return Slack(self.truncation * steps, self.divergence * steps)

    @property
    def total_variation(self) -> float:
        """τ ≤ Σ truncation + √(Σ divergence / 2): the union bound, and Pinsker's inequality after the chain rule."""
        return (self.truncation + math.sqrt(self.divergence / 2.0)) * _ROUNDING

    def costs(self, epsilon: float) -> float:
        """(1 + e^ε)·τ, what this takes of δ; ``inf`` where e^ε is too large to write down."""
        tau = self.total_variation
        if tau == 0.0:
            return 0.0
        return (1.0 + math.exp(epsilon)) * tau if epsilon < 700.0 else math.inf


def slack_of(mechanism: Mechanism) -> Slack:
    """The slack of one step: its distance from one step of the Poisson-subsampled Gaussian mechanism.

    ``dataset_size`` must be at least the actual number of examples. Cut draws of Poisson sampling are no slack: they are
    accounted for as what they are (:func:`lightning_dp.accounting.phase.phase_of`).
    """
    sampling, noise = mechanism.sampling, mechanism.noise
    truncation = 0.0
    if sampling.max_batch_size is not None and sampling.scheme != "poisson":
        truncation = truncation_probability(sampling.dataset_size, sampling.probability, sampling.max_batch_size)
    return Slack(truncation, discretisation_divergence(noise.grid_std, noise.coordinates or 0))


def truncation_probability(dataset_size: int, sampling_probability: float, max_batch_size: int) -> float:
    """P[Binomial(N + 1, q) > M]: how likely a step's draw is cut, with the larger of two neighbouring datasets.

    A run that cuts and one that does not are the same until the first draw above M, so their laws differ by at most
    the probability that there is one, whatever is done with the surplus (Chua et al. 2024, arXiv 2411.04205, account
    for truncated batches in the same way).

    Example:
        >>> truncation_probability(1000, 0.1, 200) < 1e-18
        True
    """
    return at_least(dataset_size + 1, sampling_probability, max_batch_size + 1)


def smallest_max_batch_size(dataset_size: int, sampling_probability: float, probability: float) -> int:
    """The smallest M whose :func:`truncation_probability` is at most ``probability``.

    Example:
        >>> smallest_max_batch_size(1000, 0.1, 1e-12)
        173
    """
    fails, holds = 0, dataset_size + 1
    while holds - fails > 1:
        middle = (holds + fails) // 2
        if truncation_probability(dataset_size, sampling_probability, middle) <= probability:
            holds = middle
        else:
            fails = middle
    return holds


def discretisation_divergence(scale: float, coordinates: int) -> float:
    """KL divergence of P discrete Gaussians of scale s from P rounded Gaussians: at most P / (50 s⁴) for s ≥ 1.

    The rounded Gaussian is post-processing of the Gaussian, since rounding commutes with adding an integer; so this
    divergence is all that separates discrete noise on integers from the Gaussian mechanism. With p(k) proportional to
    exp(-k²/2s²) over the integers and r(k) the N(0, s²) measure of [k - ½, k + ½]:

    - p(k) ≤ φ(k) = exp(-k²/2s²) / (s√2π), since by Poisson summation the normaliser is at least s√2π;
    - log(r(k)/φ(k)) = log ∫ cosh(kt/s²) exp(-t²/2s²) dt over -½ ≤ t ≤ ½, which by Jensen's inequality and
      log cosh x ≥ x²/2 - x⁴/12 is at least k²/24s⁴ - k⁴/960s⁸ - 1/24s²;
    - the discrete Gaussian has E[k²] ≥ s² - 12π²s⁴exp(-2π²s²) (Poisson summation) and, being sub-Gaussian, E[k⁴] ≤ 16s⁴.

    So KL(p‖r) ≤ 1/60s⁴ + 5·exp(-2π²s²) ≤ 1/50s⁴. Coordinates are independent, so their divergences add. At s = ∞, without a
    grid, there is none.

    Raises:
        ValueError: the scale is below 1, where the bound does not hold.
    """
    if scale < 1.0:
        raise ValueError(f"scale={scale:g}: expected discrete noise of at least one unit of the grid.")
    return 0.0 if math.isinf(scale) else coordinates / (50.0 * scale**4)
