"""What the blocks of balls-in-bins sampling tell under noise that is correlated over the steps: ε by simulation, with proof.

Without the example what is released is Q = N(0, σ²I), as numbers along its gradient. With it, it is P = mean over j of
N(mⱼ, σ²I): mⱼ = C·(1 in the steps of bin j, else 0) for a strategy matrix C ≥ 0. With K = ⟨mᵢ, mⱼ⟩/σ² and T ~ N(0, K) under Q,

    S = dP/dQ = mean over j of exp(Tⱼ - Kⱼⱼ/2),    δ_remove = E_Q[(S - e^ε)₊],    δ_add = E_Q[(1 - e^ε S)₊].

**Why it is enough to look at this pair.** Both are expectations of convex functions F of S = Σ pⱼ Lⱼ, where Lⱼ is the
likelihood ratio of bin j. Let gradients be vectors that earlier releases choose. Row t then adds ⟨mᵢ(t), mⱼ(t)⟩/σ² to the
covariance of log Lᵢ and log Lⱼ, and as C ≥ 0 and gradients are at most of norm 1, that is at most what it is here. More
covariance only makes E[F(S)] larger (Kahane 1985): along the interpolation between two covariances its derivative is
½ Σ ΔKᵢⱼ E[Lᵢ Lⱼ ∂²F/∂Lᵢ∂Lⱼ] ≥ 0. Going back from the last row, the function to be bounded before row t is again of that form,
E[F(Σ pⱼ Lⱼ Aⱼ)] with Aⱼ ≥ 0 of the rows to come, so the argument holds at each row, whatever was released before it.

**How δ is bounded.** By importance sampling whose weights have a bound that is close to δ itself:

- removed: indices j₁, …, j_w are drawn one after the other, each with odds exp(Σ K of those before), and then
  T ~ N(Σ K of all, K). So E[(S - e^ε)₊ S^-w ∏ Zₐ] = δ_remove with Zₐ the mean of the odds after a indices, and
  ∏ Zₐ ≤ ∏ maxⱼ meanᵢ exp(a·Kᵢⱼ) by Hölder's inequality.
- added: T ~ N(-s·mean K, K). So E[(1 - e^ε S)₊ exp(s·mean T + s²v/2)] = δ_add with v the mean of K, and log S is at least
  mean(T - K_jj/2) by Jensen's inequality.

Both are means of numbers in a known interval [0, B], and the empirical Bernstein bound holds for them but for a stated
probability, which is taken from δ.

Source: Choquette-Choo, Ganesh, Haque, Steinke, Thakurta 2024 (arXiv 2410.06266) and Chua et al. 2024 (arXiv 2412.16802),
for the pair and for simulating it; Kahane 1985, *Sur le chaos multiplicatif*, for the inequality. The sampling by w indices,
its bound and the step-by-step argument are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

import numpy as np

from lightning_dp.accounting.phase import Phase, as_known
from lightning_dp.accounting.rdp import FloatArray
from lightning_dp.plan.sampling import block_of

FAILURE = 1e-3
"""The part of δ that is set aside for it that a bound of the plan is too small."""

SEED = 20261130
"""Public and always the same, so that the same plan has the same ε."""

_POINTS, _BOUNDS = 2**11, 2**10
"""At how many ε a bound may be asked for, and how many bounds a plan may need: the failure probability is shared among them."""

_MOST_BINS, _MOST_ORDER, _MOST_ROUNDS = 1024, 64, 8
_WORK, _MOST_SAMPLES, _AT_ONCE = 4e7, 2**17, 2**16
_LARGEST = 300.0
"""The largest entry of K that is worked with: beyond, ε is hundreds and nothing is amplified."""


_Mixtures = Sequence[tuple[FloatArray, int]]
"""K, and of how many independent rounds it is."""


def covariance(phase: Phase) -> FloatArray:
    """K of one round of a phase, of bins or of the Gaussian mechanism; a little is added, so that it has a square root.

    Of more than 1024 bins it counts as told which residue an example's bin leaves, so that one class of them is left: the
    first, which loses the most, since the covariances of the others are of fewer rows.
    """
    if phase.correlation is None:
        return np.full((1, 1), 1.0 / phase.noise_multiplier**2)
    bins = block_of(phase.sampling_probability)
    stride = next(w for w in range(1, bins + 1) if bins % w == 0 and bins // w <= _MOST_BINS)
    found = phase.correlation.gram(phase.blocks * bins, bins)[::stride, ::stride]
    found = found / (phase.correlation.column_norm * phase.noise_multiplier) ** 2
    return np.asarray(found + 1e-10 * float(np.max(found)) * np.eye(len(found)))


def apart(phase: Phase, delta: float) -> tuple[Phase, ...]:
    """Rounds without correlation that lose no less privacy than ``phase``, which can be composed with any others.

    The bins that leave one residue modulo w are left, as if it were told which; the covariance of every two of them is raised
    to the largest, c, which only adds to the loss (see above). Then S is a product of two independent ratios: of a Gaussian
    mechanism of variance c, and of an allocation to ⌊k/w⌋ steps of the rest. w is the one with the least Rényi bound.
    """
    if phase.law != "bins":
        return (phase,)
    covariances = covariance(phase)
    bins, most = len(covariances), float(np.max(covariances))
    best: tuple[float, tuple[Phase, ...]] = (math.inf, (as_known(phase),))
    for w in range(1, bins // 2 + 1):
        common, left = float(np.max(covariances[0, w::w])), bins // w
        own = most - common
        if own <= 1e-9 * most or (w > 16 and w & (w - 1)):
            continue

        log_means = (
            phase.steps * (a * common + float(np.logaddexp(a * own - math.log(left), math.log1p(-1.0 / left))))
            for a in count(1)
        )
        allocated = Phase(1.0 / math.sqrt(own), 1.0 / left, phase.steps, "allocation")
        known = (Phase(1.0 / math.sqrt(common), 1.0, phase.steps),) if common > 1e-12 else ()
        best = min(best, (_order(log_means, delta)[1], (*known, allocated)), key=lambda one: one[0])
    return best[1]


def can_simulate(phases: Sequence[Phase]) -> bool:
    """Whether :func:`simulated_bound` takes these: a few stretches of bins, and Gaussian mechanisms without sampling."""
    rounds = sum(phase.steps for phase in phases if phase.law == "bins")
    return (
        0 < rounds <= _MOST_ROUNDS
        and all(phase.law == "bins" or phase.sampling_probability == 1.0 for phase in phases)
        and all(float(np.max(covariance(phase))) * phase.steps <= _LARGEST for phase in phases)
    )


def simulated_bound(phases: Sequence[Phase], delta: float, highest: float) -> tuple[float, float]:
    """Upper bounds on ε as the example is removed and as it is added, of phases that :func:`can_simulate`.

    Args:
        phases: with noise.
        delta: δ.
        highest: an upper bound on ε that is known.

    Guarantee:
        Over the choice of the seed, the probability that any of 1024 plans has a bound that is too small is at most δ/1000,
        and δ is lowered by that. Where the simulation cannot tell, the answer is ``highest``, or a closed bound.
    """
    mixtures, left = _mixtures(phases), delta * (1.0 - FAILURE)
    confidence = math.log(2.0 * 2.0 * _POINTS * _BOUNDS / (FAILURE * delta))
    return (
        _least(_Removed(mixtures, left), left, confidence, highest),
        _least(_Added(mixtures, left), left, confidence, highest),
    )


def closed_bound(phases: Sequence[Phase], delta: float) -> float:
    """An upper bound in closed form on ε of phases that :func:`can_simulate`, about a seventh larger: a guess to start from."""
    mixtures = _mixtures(phases)
    return max(_order(_log_means(mixtures), delta)[1], _down(mixtures, delta)[2])


def _mixtures(phases: Sequence[Phase]) -> _Mixtures:
    found = [(covariance(phase), phase.steps) for phase in phases if phase.steps]
    return [(one * rounds, 1) if len(one) == 1 else (one, rounds) for one, rounds in found]


class _Weighted(Protocol):
    closed: float
    """An upper bound on ε without simulation."""

    def range(self, epsilon: float) -> float:
        """B: no weighted sample is above it."""

    def samples(self, epsilon: float) -> FloatArray:
        """Weighted samples whose mean is δ(ε), ``(n,)``."""


def _least(way: _Weighted, delta: float, confidence: float, highest: float) -> float:
    """The least ε of a grid below what is known at which the empirical Bernstein bound on δ(ε) is at most ``delta``.

    Source: Maurer and Pontil 2009 (arXiv 0907.3740), Theorem 4.
    """
    highest = min(highest, way.closed)

    def holds(point: int) -> bool:
        epsilon = highest * point / _POINTS
        largest, values = way.range(epsilon), way.samples(epsilon)
        n = len(values)
        spread = math.sqrt(2.0 * float(np.var(values, ddof=1)) * confidence / n)
        return float(np.mean(values)) + spread + largest * 7.0 * confidence / (3.0 * (n - 1)) <= delta

    fails, good = 0, _POINTS
    while good - fails > 1:
        middle = (fails + good) // 2
        fails, good = (fails, middle) if holds(middle) else (middle, good)
    return highest * good / _POINTS


@dataclass(frozen=True)
class _Samples:
    """log S, and the logarithm of the weight beside the integrand."""

    log_ratio: FloatArray
    log_weight: FloatArray


def _order(log_means: Iterator[float], delta: float) -> tuple[int, float, float]:
    """The order w of least ε by E[S^w] ≤ ∏ maxⱼ meanᵢ exp(a·Kᵢⱼ) over a < w, that ε, and the logarithm of that bound."""
    best, log_moment = (2, math.inf, math.inf), 0.0
    for w in range(2, _MOST_ORDER + 1):
        log_moment += next(log_means)
        epsilon = (log_moment + _peak(w - 1.0) - math.log(delta)) / (w - 1.0)
        if epsilon < best[1]:
            best = (w, epsilon, log_moment)
        elif epsilon > 1.5 * best[1]:
            break
    return best


def _log_means(mixtures: _Mixtures) -> Iterator[float]:
    """The logarithm of maxⱼ meanᵢ exp(a·Kᵢⱼ), over all rounds, for a = 1, then 2, and so on."""
    scaled = [np.exp(one - np.max(one)) for one, _ in mixtures]
    powers = [np.ones_like(one) for one in scaled]
    for a in count(1):
        found = 0.0
        for (one, rounds), scale, power in zip(mixtures, scaled, powers, strict=True):
            power *= scale
            found += rounds * (a * float(np.max(one)) + math.log(float(np.max(np.mean(power, axis=0)))))
        yield found


def _down(mixtures: _Mixtures, delta: float) -> tuple[float, float, float]:
    """The s of least ε by (1 - x)x^s ≤ s^s/(s + 1)^(s + 1), the logarithm of B at ε = 0, and that ε."""
    own = sum(rounds * float(np.mean(np.diag(one))) for one, rounds in mixtures)
    common = sum(rounds * float(np.mean(one)) for one, rounds in mixtures)
    orders = [float(s) for s in np.geomspace(1e-3, 1e3, 400)]
    found = [(s, s * own / 2.0 + s * s * common / 2.0 + _peak(s)) for s in orders]
    bounds = [(s, log_range, (log_range - math.log(delta)) / s) for s, log_range in found]
    return min(bounds, key=lambda one: one[2])


class _Removed:
    """P is what is released: S is large where much is lost."""

    def __init__(self, mixtures: _Mixtures, delta: float) -> None:
        self._order, self.closed, self._log_moment = _order(_log_means(mixtures), delta)
        number = _count(_width(mixtures) * self._order)
        generator = np.random.default_rng(SEED)
        self._drawn = _together(mixtures, lambda one: _tilted(one, self._order, number, generator))

    def range(self, epsilon: float) -> float:
        w = self._order
        return math.exp(self._log_moment + _peak(w - 1.0) - (w - 1.0) * epsilon)

    def samples(self, epsilon: float) -> FloatArray:
        ratio, weight = self._drawn.log_ratio, self._drawn.log_weight
        beyond = -np.expm1(np.minimum(epsilon - ratio, 0.0))
        return np.asarray(beyond * np.exp((1 - self._order) * ratio + weight))


class _Added:
    """Q is what is released: S is small where much is lost."""

    def __init__(self, mixtures: _Mixtures, delta: float) -> None:
        self._order, self._log_range, self.closed = _down(mixtures, delta)
        number, generator = _count(_width(mixtures)), np.random.default_rng(SEED + 1)
        self._drawn = _together(mixtures, lambda one: _shifted(one, self._order, number, generator))

    def range(self, epsilon: float) -> float:
        return math.exp(min(690.0, self._log_range - self._order * epsilon))

    def samples(self, epsilon: float) -> FloatArray:
        beyond = -np.expm1(np.minimum(epsilon + self._drawn.log_ratio, 0.0))
        return np.asarray(beyond * np.exp(self._drawn.log_weight))


def _peak(s: float) -> float:
    """The logarithm of s^s/(s + 1)^(s + 1), the largest (1 - x)·x^s."""
    return s * math.log(s) - (s + 1.0) * math.log1p(s)


def _width(mixtures: _Mixtures) -> int:
    return sum(len(one) * rounds for one, rounds in mixtures)


def _count(work: int) -> int:
    return int(min(_MOST_SAMPLES, max(2**12, _WORK / work)))


def _together(mixtures: _Mixtures, draw: Callable[[FloatArray], _Samples]) -> _Samples:
    """Ratios and weights of independent rounds multiply."""
    drawn = [draw(one) for one, rounds in mixtures for _ in range(rounds)]
    return _Samples(np.sum([one.log_ratio for one in drawn], axis=0), np.sum([one.log_weight for one in drawn], axis=0))


def _in_rows(number: int, width: int) -> list[int]:
    most = max(1, _AT_ONCE // width)
    return [min(most, number - first) for first in range(0, number, most)]


def _log_ratio(t: FloatArray, own: FloatArray) -> FloatArray:
    t = t - own / 2.0
    most = np.max(t, axis=1)
    return np.asarray(most + np.log(np.mean(np.exp(t - most[:, None]), axis=1)))


def _tilted(covariances: FloatArray, order: int, number: int, generator: np.random.Generator) -> _Samples:
    """From the law in which S^w weighs outcomes, index by index, with what its normaliser is off at each."""
    width, root, own = len(covariances), np.linalg.cholesky(covariances), np.diag(covariances)
    odds_of, ratios, weights = np.exp(covariances), [], []
    for rows in _in_rows(number, width):
        odds, chosen_by = np.full((rows, width), 1.0 / width), np.zeros((rows, width))
        normaliser, weight, each = np.zeros(rows), np.zeros(rows), np.arange(rows)
        for _ in range(order):
            up_to = np.cumsum(odds, axis=1)
            total = up_to[:, -1:]
            normaliser += np.log(total[:, 0])  # log Zₐ, since odds are scaled to a sum of 1 each time
            weight += normaliser
            chosen = np.minimum(np.count_nonzero(up_to < generator.random((rows, 1)) * total, axis=1), width - 1)
            chosen_by[each, chosen] += 1.0
            odds *= odds_of[chosen]
            odds /= total
        t = chosen_by @ covariances + generator.standard_normal((rows, width)) @ root.T
        ratios.append(_log_ratio(t, own))
        weights.append(weight)
    return _Samples(np.concatenate(ratios), np.concatenate(weights))


def _shifted(covariances: FloatArray, s: float, number: int, generator: np.random.Generator) -> _Samples:
    """All bins' outcomes moved down together, with the density of the law without the example over this one's."""
    width, root, own = len(covariances), np.linalg.cholesky(covariances), np.diag(covariances)
    down, common, ratios, weights = s * np.mean(covariances, axis=0), float(np.mean(covariances)), [], []
    for rows in _in_rows(number, width):
        t = generator.standard_normal((rows, width)) @ root.T - down
        ratios.append(_log_ratio(t, own))
        weights.append(s * np.mean(t, axis=1) + s * s * common / 2.0)
    return _Samples(np.concatenate(ratios), np.concatenate(weights))
