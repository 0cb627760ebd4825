"""ε against an independent accountant (dp_accounting's PLD), and the laws that any ε obeys."""

from __future__ import annotations

import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import scipy.fft
from dp_accounting.pld import privacy_loss_distribution
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lightning_dp.accounting import EpsilonBound, EpsilonCurve, Phase, epsilon_bound, rdp_epsilon
from lightning_dp.accounting.epsilon import gaussian_epsilon
from lightning_dp.accounting.phase import Law
from lightning_dp.accounting.pld import pld_bound, pld_bounds
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.risk import risk_of
from tests.nearly import assert_nearly

CIFAR = Phase(3.0, 4096 / 50000, 875)
IMAGENET = Phase(2.5, 16384 / 1281167, 72000)


def pld_epsilon(phases: list[Phase], delta: float, interval: float = 1e-4) -> float:
    """ε of both directions by dp_accounting's privacy loss distributions ("connect the dots")."""
    composed = None
    for phase in phases:
        one = privacy_loss_distribution.from_gaussian_mechanism(
            phase.noise_multiplier,
            sampling_prob=phase.sampling_probability,
            value_discretization_interval=interval,
        )
        many = one.self_compose(phase.steps)
        composed = many if composed is None else composed.compose(many)
    assert composed is not None
    return float(composed.get_epsilon_for_delta(delta))


@pytest.mark.parametrize(
    ("phase", "delta", "pld", "upper", "rdp"),
    [
        (CIFAR, 1e-5, 3.6016, 3.6018, 3.9102),
        (Phase(4.0, 4096 / 50000, 2000), 1e-5, 4.0627, 4.0628, 4.3988),
        (Phase(1.0, 0.01, 1000), 1e-5, 1.8282, 1.8283, 2.1014),
        (IMAGENET, 8e-7, 7.4652, 7.4661, 7.9537),
    ],
)
def test_reference_table(phase: Phase, delta: float, pld: float, upper: float, rdp: float) -> None:
    """Figures of dp_accounting 0.6 (PLD, RDP), and the upper bound just above them."""
    bound = epsilon_bound([phase], delta)
    assert bound.accountant == "PRV"
    assert bound.epsilon == pytest.approx(upper, abs=1e-3)
    assert pld < bound.epsilon
    assert rdp_epsilon([phase], delta) == pytest.approx(rdp, rel=2e-3)


def test_the_cifar_plan() -> None:
    assert 3.601 <= epsilon_bound([CIFAR], 1e-5).epsilon <= 3.62


def test_rdp_of_a_published_test() -> None:
    """jax_privacy's own test: σ = 4, q = 1024/50000, 10,000 steps, δ = 1e-5 spend 2.27535 by RDP."""
    assert rdp_epsilon([Phase(4.0, 1024 / 50000, 10_000)], 1e-5) == pytest.approx(2.27535, rel=2e-3)


MECHANISMS = st.tuples(
    st.sampled_from([0.8, 1.0, 1.5, 2.5, 5.0]),
    st.sampled_from([0.001, 0.01, 0.05, 0.2, 0.6, 0.95]),
    st.sampled_from([1, 3, 20, 120]),
)
DELTAS = st.sampled_from([1e-3, 1e-5, 1e-7])


@settings(max_examples=16)
@given(mechanism=MECHANISMS, delta=DELTAS)
def test_prv_lies_between_pld_and_rdp(mechanism: tuple[float, float, int], delta: float) -> None:
    phases = [Phase(*mechanism)]
    pld = pld_epsilon(phases, delta, interval=1e-4)
    bound = epsilon_bound(phases, delta)
    assert pld - 2e-4 <= bound.epsilon <= pld * 1.001 + 1e-4
    assert bound.epsilon <= rdp_epsilon(phases, delta) + 1e-12


@pytest.mark.parametrize(
    ("phases", "delta"),
    [
        ([Phase(1.0, 0.01, 300), Phase(2.0, 0.1, 200)], 1e-5),
        ([Phase(2.0, 0.2, 50), Phase(8.0, 1.0, 3), Phase(1.5, 0.02, 100)], 1e-6),
    ],
)
def test_heterogeneous_composition_agrees_with_pld(phases: list[Phase], delta: float) -> None:
    pld = pld_epsilon(phases, delta)
    bound = epsilon_bound(phases, delta)
    assert bound.accountant == "PRV"
    assert pld - 2e-4 <= bound.epsilon <= pld * 1.001 + 1e-4
    assert epsilon_bound(phases[::-1], delta).epsilon == pytest.approx(bound.epsilon, abs=1e-6)


def test_splitting_a_phase_changes_nothing() -> None:
    split = [Phase(2.0, 0.1, 40), Phase(2.0, 0.1, 0), Phase(2.0, 0.1, 60)]
    assert_nearly(epsilon_bound(split, 1e-5), epsilon_bound([Phase(2.0, 0.1, 100)], 1e-5))


@pytest.mark.parametrize("direction", [0, 1], ids=["remove", "add"])
@pytest.mark.parametrize(("sigma", "q", "delta"), [(0.7, 0.3, 1e-3), (2.0, 0.9, 1e-2), (1.0, 0.05, 1e-4)])
def test_one_step_of_each_direction_has_its_closed_form(direction: int, sigma: float, q: float, delta: float) -> None:
    """The hockey-stick divergence of one step is two normal tails, in either direction."""
    epsilon = pld_bounds([Phase(sigma, q, 1)], delta)[direction]
    assert epsilon > 0.02

    def exact_delta(eps: float) -> float:
        odds = (math.exp(eps if direction == 0 else -eps) - (1 - q)) / q
        if odds <= 0:  # adding an example loses at most -log(1 - q)
            return 0.0
        x = sigma**2 * math.log(odds) + 0.5
        if direction == 0:  # (1 - q)·N(0) + q·N(1) against N(0): outputs above x
            without = norm.sf(x / sigma)
            p = (1 - q) * without + q * norm.sf((x - 1) / sigma)
            return float(p - math.exp(eps) * without)
        p = norm.cdf(x / sigma)  # N(0) against the mixture: outputs below x
        return float(p - math.exp(eps) * ((1 - q) * p + q * norm.cdf((x - 1) / sigma)))

    assert exact_delta(epsilon) <= delta * (1.0 + 1e-9)  # an upper bound
    assert exact_delta(epsilon * (1.0 - 1e-3) - 1e-5) >= delta  # and hardly above


def test_full_batch_is_the_gaussian_mechanism() -> None:
    """q = 1 is exact, PRV at q = 1 - 1e-9 agrees with it, and δ(ε) gives back δ."""
    phases = [Phase(2.0, 1.0, 3), Phase(5.0, 1.0, 10)]
    bound = epsilon_bound(phases, 1e-5)
    assert_nearly(bound, EpsilonBound(gaussian_epsilon(phases, 1e-5), "exact"))
    mu, eps = math.sqrt(3 / 4 + 10 / 25), bound.epsilon
    delta = norm.cdf(mu / 2 - eps / mu) - math.exp(eps) * norm.cdf(-mu / 2 - eps / mu)
    assert delta == pytest.approx(1e-5, rel=1e-6)
    assert delta <= 1e-5
    almost = [Phase(p.noise_multiplier, 1 - 1e-9, p.steps) for p in phases]
    assert eps - 1e-4 < epsilon_bound(almost, 1e-5).epsilon < eps + 1e-3


@pytest.mark.parametrize("q", [0.01, 0.3, 1.0])
def test_laws_of_order(q: float) -> None:
    """ε falls as σ or δ grows, and rises with q and with the number of steps."""

    @cache
    def eps(sigma: float = 1.0, prob: float = q, steps: int = 50, delta: float = 1e-5) -> float:
        return epsilon_bound([Phase(sigma, prob, steps)], delta).epsilon

    assert eps(sigma=0.7) > eps() > eps(sigma=1.4) > eps(sigma=20.0) >= 0
    assert eps(prob=q / 2) < eps()
    assert eps(steps=25) < eps() < eps(steps=100)
    assert eps(delta=1e-7) > eps() > eps(delta=1e-3)


@pytest.mark.parametrize(
    ("phase", "delta"),
    [
        (Phase(1.0, 0.01, 1000), 1e-18),
        (Phase(0.3, 0.01, 1000), 1e-5),
        (Phase(0.3, 0.5, 10**6), 1e-5),
        (Phase(0.02, 0.01, 10), 1e-5),
        (Phase(1e6, 0.01, 10**6), 1e-5),
        (Phase(1e6, 1.0, 1), 1e-5),
        (Phase(1.0, 1e-9, 1000), 1e-5),
        (Phase(1.0, 0.01, 10**6), 1e-5),
        (Phase(1.0, 0.2, 500), 1e-5),
        (Phase(4.0, 0.00033, 10_000), 1.13e-18),
        (Phase(1.0, 0.999, 1), 0.9),
    ],
    ids=str,
)
def test_extreme_plans_have_an_answer(phase: Phase, delta: float) -> None:
    """Finite, never negative, never above RDP; where PRV gives up, the note says why."""
    bound = epsilon_bound([phase], delta)
    assert 0 <= bound.epsilon < math.inf
    assert bound.epsilon <= rdp_epsilon([phase], delta) * (1 + 1e-12)
    if bound.accountant == "RDP":
        assert bound.note is not None
        assert "RDP" in bound.note


def test_fallback_is_flagged() -> None:
    bound = epsilon_bound([Phase(0.3, 0.5, 10**6)], 1e-5)
    assert bound.accountant == "RDP"
    assert_nearly(bound.epsilon, rdp_epsilon([Phase(0.3, 0.5, 10**6)], 1e-5))
    assert "may exceed 600" in str(bound.note)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 0.9])
def test_numbers_that_cannot_be_right_fall_back(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble inside the Fourier transform becomes a flagged RDP bound, not a small ε."""
    irfft = scipy.fft.irfft
    monkeypatch.setattr(scipy.fft, "irfft", lambda *args: irfft(*args) * wrong)
    with np.errstate(invalid="ignore"):
        bound = EpsilonCurve([], 1.27, 0.1, 1e-5).at(10)
    assert bound.accountant == "RDP"
    assert_nearly(bound.epsilon, rdp_epsilon([Phase(1.27, 0.1, 10)], 1e-5))
    assert "composed probabilities sum to" in str(bound.note)


def test_a_million_steps_and_what_no_grid_holds() -> None:
    bound = epsilon_bound([Phase(1.0, 0.01, 10**6)], 1e-5)
    assert (bound.accountant, bound.note) == ("PRV", None)
    with pytest.raises(PrvFailureError, match="beyond what a grid can hold"):
        pld_bound([Phase(0.3, 0.5, 10**6)], 1e-5)


@pytest.mark.parametrize(
    ("phase", "delta", "pld"),
    [
        (Phase(100.0, 0.00825, 388), 1e-5, 0.00392),
        (Phase(3.3, 4.3e-4, 33), 1e-12, 0.0053),
        (Phase(3.0, 0.1, 3), 1e-5, 0.2635),
    ],
)
def test_a_small_epsilon_has_a_small_error(phase: Phase, delta: float, pld: float) -> None:
    """Not above dp_accounting's, on its finest grid, where an error that is added would be as large as ε itself."""
    assert epsilon_bound([phase], delta).epsilon <= pld


@pytest.mark.parametrize("delta", [1e-3, 1e-9, 1e-15, 1e-30, 1e-100])
def test_one_step_at_any_delta(delta: float) -> None:
    """δ(ε) of the larger direction is two normal tails; by logarithms, since δ is far below what a transform rounds."""
    sigma, q = 1.1, 0.03
    epsilon = epsilon_bound([Phase(sigma, q, 1)], delta).epsilon
    x = sigma**2 * (epsilon + math.log1p(-(1 - q) * math.exp(-epsilon)) - math.log(q)) + 0.5
    log_without, log_with = norm.logsf(x / sigma), norm.logsf((x - 1) / sigma)
    log_p = np.logaddexp(math.log1p(-q) + log_without, math.log(q) + log_with)
    log_delta = log_p + math.log(-math.expm1(epsilon + log_without - log_p))
    assert math.log(delta) * 1.05 <= log_delta <= math.log(delta) + 1e-9


def test_no_steps_and_no_noise() -> None:
    assert epsilon_bound([], 1e-5) == EpsilonBound(0.0, "exact")
    assert epsilon_bound([Phase(0.0, 0.1, 0)], 1e-5).epsilon == 0
    assert epsilon_bound([Phase(1.0, 0.1, 5), Phase(0.0, 0.1, 1)], 1e-5).epsilon == math.inf
    assert rdp_epsilon([Phase(0.0, 0.1, 1)], 1e-5) == math.inf
    assert rdp_epsilon([], 1e-5) == 0


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_delta_outside_its_range(delta: float) -> None:
    with pytest.raises(ValueError, match="delta="):
        epsilon_bound([CIFAR], delta)
    with pytest.raises(ValueError, match="delta="):
        rdp_epsilon([CIFAR], delta)
    with pytest.raises(ValueError, match="delta="):
        EpsilonCurve([], 1.0, 0.1, delta)


@pytest.mark.parametrize(
    ("numbers", "name"),
    [
        ((-1.0, 0.1, 1), "noise_multiplier"),
        ((math.inf, 0.1, 1), "noise_multiplier"),
        ((1.0, 0.0, 1), "sampling_probability"),
        ((1.0, 1.1, 1), "sampling_probability"),
        ((1.0, 0.1, -1), "steps"),
    ],
)
def test_phases_outside_their_range(numbers: tuple[float, float, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        Phase(*numbers)


def test_curve_never_falls_in_whatever_order_it_is_asked() -> None:
    curve = EpsilonCurve([Phase(1.5, 0.05, 30)], 2.0, 0.1, 1e-5)
    order = np.random.default_rng(0).permutation(261)
    for steps in order:  # 260 is beyond the foreseen 200: the grid grows on the way
        curve.at(int(steps))
    values = [curve.at(steps).epsilon for steps in range(261)]
    assert all(a <= b for a, b in pairwise(values))
    assert values[0] == pytest.approx(epsilon_bound([Phase(1.5, 0.05, 30)], 1e-5).epsilon, abs=0.012)
    assert values[-1] > values[0] + 1


@pytest.mark.parametrize("steps", [1, 10, 100, 875])
def test_curve_stays_an_upper_bound_before_its_end(steps: int) -> None:
    """Each value is at least PLD's ε and hardly above it."""
    curve = EpsilonCurve([], CIFAR.noise_multiplier, CIFAR.sampling_probability, 1e-5)
    pld = pld_epsilon([Phase(CIFAR.noise_multiplier, CIFAR.sampling_probability, steps)], 1e-5)
    assert pld - 2e-4 <= curve.at(steps).epsilon <= pld * 1.001 + 1e-4


def test_curve_agrees_with_the_bound() -> None:
    """The same number, whether the equal steps before are history or not, and foreseen or not."""
    bound = epsilon_bound([Phase(2.0, 0.1, 90)], 1e-5)
    assert_nearly(EpsilonCurve([], 2.0, 0.1, 1e-5).at(90), bound)
    assert_nearly(EpsilonCurve([Phase(2.0, 0.1, 50)], 2.0, 0.1, 1e-5).at(40), bound)
    unforeseen = EpsilonCurve([], 2.0, 0.1, 1e-5).at(90)
    assert unforeseen.epsilon == pytest.approx(bound.epsilon, abs=1e-3)


def test_curve_refuses_negative_steps() -> None:
    with pytest.raises(ValueError, match="steps=-1"):
        EpsilonCurve([], 2.0, 0.1, 1e-5).at(-1)


@pytest.mark.parametrize("law", ["poisson", "allocation"])
@pytest.mark.parametrize("sigma", [0.5, 0.25, 0.2, 0.1, 0.05, 0.01])
def test_hardly_any_noise_is_answered_without_overflow(sigma: float, law: Law) -> None:
    """ε in the hundreds is where e^ε and squares of likelihood ratios end; a warning of NumPy's is an error here."""
    phases = [Phase(sigma, 0.1, 100, law)]
    risk = risk_of(phases)
    assert 20.0 < epsilon_bound(phases, 1e-5).epsilon < math.inf
    assert 0.5 < risk.advantage <= 1.0
    assert all(0.0 <= rate <= 1.0 for rate in risk.tpr_at_fpr.values())
