"""How well the best attacker guesses if the plan is followed to the letter: what the white-box scores are held against."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from lightning_dp.accounting.phase import phase_of
from lightning_dp.accounting.pld import pld_delta
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan

SIMULATED = 20_000
"""Canaries simulated, half of them in."""

Scores = npt.NDArray[np.float64]


def log_likelihood_ratio(released: Scores, mechanism: Mechanism) -> Scores:
    """Log of (1-q)·N(0, s²) + q·N(1, s²) over N(0, s²) at what one step released along a canary's coordinate, in units of C.

    Here s = σ·S/C is the noise on that coordinate: σ, and with what adapts C a little more.

    The best test there is between a canary that is in and one that is not adds this up over the steps (Neyman and
    Pearson 1933). Without noise (σ = 0) it is the released value itself.

    Args:
        released: the noisy gradient there, ``(m,)``, as given to the optimizer.
        mechanism: of the step: B and C, to undo the division and the clip norm's unit, and S, σ and q.
    """
    clip_norm, q = mechanism.clipping.clip_norm, mechanism.sampling.probability
    x = released * mechanism.divisor / (clip_norm if math.isfinite(clip_norm) else 1.0)
    if mechanism.noise.noise_multiplier == 0:
        return x
    z = (2.0 * x - 1.0) / (2.0 * noise_on_a_canary(mechanism) ** 2)
    if q == 1:
        return z
    return np.logaddexp(math.log1p(-q), math.log(q) + z)


def noise_on_a_canary(mechanism: Mechanism) -> float:
    """σ·S/C, from the numbers themselves and not by the property that the noise reads: what is audited may be wrong there."""
    return mechanism.noise.noise_multiplier * mechanism.sensitivity / mechanism.clipping.clip_norm


def plan_accuracy(plan: PrivacyPlan, steps: int, seed: int = 0) -> float:
    """The share of right guesses about all canaries that the best test reaches, a simulated upper limit of it.

    A canary of gradient norm C is drawn with probability q at each of ``steps`` steps and N(0, (σS/C)²) is added; the guess
    is "in" where the log-likelihood ratio is above 0. No test of any kind guesses better on average, since the coins are
    fair: this is (1 + δ(0)) / 2, with δ(0) the total variation distance between training with and without the canary.
    Five standard errors of the simulation are added. Where the steps are not memoryless, δ(0) is the accountant's.

    Args:
        plan: with σ > 0.
        steps: T.
        seed: of the simulation.
    """
    if not plan.mechanism.memoryless:
        return (1.0 + pld_delta([phase_of(plan.mechanism, steps)], 0.0)) / 2.0
    generator = np.random.default_rng(seed)
    members = np.arange(SIMULATED) % 2 == 0
    scores = np.zeros(SIMULATED)
    unit, noise = plan.clip_norm / plan.expected_batch_size, noise_on_a_canary(plan.mechanism)
    for _ in range(steps):
        drawn = members & (generator.random(SIMULATED) < plan.sampling_probability)
        noisy = drawn + noise * generator.standard_normal(SIMULATED)
        scores += log_likelihood_ratio(noisy * unit, plan.mechanism)
    right = float(np.mean((scores > 0) == members))
    return min(1.0, right + 5.0 * math.sqrt(max(right * (1.0 - right), 1.0 / SIMULATED) / SIMULATED))


def plan_p_value(scores: Scores, members: npt.NDArray[np.bool_], plan: PrivacyPlan, steps: int) -> float | None:
    """How likely guesses this good are if the plan is followed; ``None`` for a plan without noise, or with correlated.

    The canaries' coordinates get noise and draws of their own, so under the plan the guesses are right independently of
    each other, each with at most :func:`plan_accuracy`.
    """
    if plan.noise_multiplier == 0 or len(members) == 0 or plan.mechanism.noise.correlation is not None:
        return None
    correct = int(np.sum((scores > 0) == members))
    return float(stats.binom.sf(correct - 1, len(members), plan_accuracy(plan, steps)))
