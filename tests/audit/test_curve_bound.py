"""The bound for a whole trade-off curve: an extremal problem solved twice, and valid where canaries conspire."""

from __future__ import annotations

import doctest
import math
from importlib import import_module

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linprog
from scipy.special import ndtr, ndtri

from lightning_dp.accounting import Phase
from lightning_dp.accounting.epsilon import epsilon_bound, gaussian_epsilon
from lightning_dp.accounting.ledger import Ledger
from lightning_dp.accounting.phase import with_noise
from lightning_dp.accounting.pld import pld_curve
from lightning_dp.accounting.prv import PrvFailureError
from lightning_dp.accounting.tradeoff import Curve, composed
from lightning_dp.audit.bound import p_value
from lightning_dp.audit.curve_bound import curve_p_value, refutes
from lightning_dp.audit.guesses import gaussian_shift, guess, planned_guesses
from lightning_dp.audit.judge import _Claim
from lightning_dp.plan.correlation import Correlation
from tests.audit.test_bound import FALSE_ALARM, randomised_response
from tests.mechanism.laws import plan


def by_linear_program(canaries: int, guesses: int, correct: int, curve: Curve) -> float:
    """The largest P[at least ``correct``] over all laws of the number of right guesses that the curve allows."""
    number = np.arange(guesses + 1)
    slopes, offsets = curve.lines
    rows, limits = [], []
    for at in range(1, correct + 1):
        right = np.where(number >= at, number, 0) / canaries
        wrong = np.where(number >= at - 1, guesses - number, 0) / canaries
        for slope, offset in zip(slopes, offsets, strict=True):
            rows.append(slope * right - wrong)
            limits.append(-offset)
    found = linprog(
        -(number >= correct).astype(float), A_ub=np.array(rows), b_ub=limits, A_eq=np.ones((1, guesses + 1)), b_eq=[1.0]
    )
    return -float(found.fun)


def few_lines(curve: Curve) -> Curve:
    """Few enough, and with slopes small enough, for a linear program."""
    chosen = np.flatnonzero(curve.epsilon < 8.0)[::100]
    return Curve(curve.epsilon[chosen], curve.removed[chosen], curve.added[chosen])


@pytest.mark.parametrize(
    "curve", [Curve.of(1.0, 1e-2), Curve.of(0.3, 0.0), few_lines(Curve.gaussian(1.0))], ids=["ε, δ", "ε", "μ"]
)
@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(12, 12, 11), (30, 10, 9), (30, 10, 10), (9, 6, 4)])
def test_the_p_value_is_the_optimum_over_all_laws(curve: Curve, canaries: int, guesses: int, correct: int) -> None:
    expected = by_linear_program(canaries, guesses, correct, curve)
    assert curve_p_value(canaries, guesses, correct, curve) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-2), (0.0, 0.05)])
@pytest.mark.parametrize("guesses", [20, 400])
def test_what_epsilon_and_delta_allow_is_refuted_no_more_often_than_it_may(
    epsilon: float, delta: float, guesses: int
) -> None:
    failures, audits, level = 0, 400, 0.2
    curve = Curve.of(epsilon, delta)
    for seed in range(audits):
        made = guess("", *randomised_response(epsilon, delta, 400, seed), guesses)
        failures += refutes(level, 400, guesses, made.correct, curve)
    assert stats.binom.sf(failures - 1, audits, level) > FALSE_ALARM


@pytest.mark.parametrize("mu", [0.5, 2.0])
def test_a_gaussian_mechanism_is_refuted_no_more_often_than_it_may_and_a_weaker_one_is(mu: float) -> None:
    audits, level, canaries, guesses = 300, 0.2, 1000, 200
    failures = weaker = 0
    for seed in range(audits):
        generator = np.random.default_rng(seed)
        members = generator.random(canaries) < 0.5
        correct = guess("", mu * members + generator.standard_normal(canaries), members, guesses).correct
        failures += refutes(level, canaries, guesses, correct, Curve.gaussian(mu))
        weaker += refutes(level, canaries, guesses, correct, Curve.gaussian(mu / 3))
    assert stats.binom.sf(failures - 1, audits, level) > FALSE_ALARM
    assert weaker > 0.9 * audits


def all_or_nothing(chance: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Everybody's coin is published with a probability, and else nobody's: (0, ``chance``)-private."""
    generator = np.random.default_rng(seed)
    members = generator.random(canaries) < 0.5
    return (members - 0.5 if generator.random() < chance else generator.standard_normal(canaries)), members


def test_a_bound_that_takes_canaries_for_independent_would_be_wrong_and_this_one_is_not() -> None:
    chance, audits, level = 0.2, 400, 0.1
    naive = ours = 0
    for seed in range(audits):
        correct = guess("", *all_or_nothing(chance, 200, seed), 200).correct
        naive += bool(stats.binom.sf(correct - 1, 200, (1 + chance) / 2) < level)
        ours += refutes(level, 200, 200, correct, Curve.of(0.0, chance))
    assert stats.binom.sf(naive - 1, audits, level) < 1e-6
    assert stats.binom.sf(ours - 1, audits, level) > FALSE_ALARM


def test_more_guesses_chosen_after_looking_would_be_wrong_and_planned_ones_are_not() -> None:
    """The pitfall of a threshold that is chosen where it looks best."""
    audits, level, canaries = 300, 0.2, 400
    curve, chosen_after = Curve.of(0.0, 0.0), 0
    for seed in range(audits):
        generator = np.random.default_rng(seed)
        members = generator.random(canaries) < 0.5
        scores = generator.standard_normal(canaries)
        chosen_after += any(
            refutes(level, canaries, r, guess("", scores, members, r).correct, curve)
            for r in (10, 20, 40, 80, 160, 320)
        )
    assert stats.binom.sf(chosen_after - 1, audits, level) < 1e-6


def test_a_curve_that_says_more_gives_a_tighter_bound_than_its_epsilon_and_delta() -> None:
    """In the regime of an audit: 40,000 canaries, ε = 4, right guesses as a Gaussian mechanism gives them."""
    mu, delta, canaries = gaussian_shift(4.0, 1e-5), 1e-5, 40_000
    guesses = planned_guesses(canaries, 4.0, delta)
    generator = np.random.default_rng(0)
    members = generator.random(canaries) < 0.5
    correct = guess("", mu * members + generator.standard_normal(canaries), members, guesses).correct
    assert p_value(canaries, guesses, correct, 2.8, delta) > 0.05  # (2.8, δ) alone is not refuted,
    assert refutes(0.05, canaries, guesses, correct, Curve.gaussian(gaussian_shift(2.4, delta)))
    assert not refutes(0.05, canaries, guesses, correct, Curve.gaussian(mu))


def test_the_two_theorems_on_epsilon_and_delta_agree_about_which_guesses_are_many() -> None:
    for guesses, correct in ((100, 80), (400, 320), (1000, 760)):
        first = p_value(1000, guesses, correct, 1.0, 1e-6)
        second = curve_p_value(1000, guesses, correct, Curve.of(1.0, 1e-6))
        assert abs(math.log10(first) - math.log10(second)) < 0.15 * abs(math.log10(first)) + 0.2


def test_the_least_probability_is_that_of_the_best_test_in_the_direction_that_says_more() -> None:
    curve = composed([Phase(1.0, 0.1, 20)])
    for share in (0.01, 0.1, 0.5, 0.9):
        assert curve.least(share) <= 1.0 - float(curve.tpr(1.0 - share)[0]) + 1e-12
        both = Curve(curve.epsilon, curve.delta, curve.delta)
        assert curve.least(share) == pytest.approx(1.0 - float(both.tpr(1.0 - share)[0]), abs=1e-12)


def test_the_curve_of_a_gaussian_mechanism_is_its_closed_form() -> None:
    for sigma in (0.7, 2.0):
        for curve in (Curve.gaussian(1 / sigma), Curve(*pld_curve([Phase(sigma, 1.0, 1)], 400, 1e-9))):
            for share in (1e-3, 0.05, 0.5, 0.9):
                closed = float(ndtr(ndtri(share) - 1 / sigma))
                assert curve.least(share) == pytest.approx(closed, rel=1e-2, abs=1e-5)
                assert curve.least(share) <= closed + 1e-9


def test_what_the_run_may_be_off_by_makes_a_claim_weaker() -> None:
    plain = composed([Phase(1.0, 0.1, 20)])
    off = plain.but_for(1e-3)
    assert all(off.least(share) < plain.least(share) for share in (0.01, 0.1, 0.5))


def test_more_noise_is_a_stronger_claim() -> None:
    phases = [Phase(1.0, 0.1, 20), Phase(2.0, 0.5, 3)]
    curves = [composed(with_noise(phases, factor)) for factor in (0.5, 1.0, 2.0)]
    for share in (0.01, 0.1, 0.5):
        assert curves[0].least(share) < curves[1].least(share) < curves[2].least(share) < share
    assert epsilon_bound(with_noise(phases, 2.0), 1e-5).epsilon < epsilon_bound(phases, 1e-5).epsilon


def test_the_shift_is_the_gaussian_mechanisms() -> None:
    assert gaussian_epsilon([Phase(1 / gaussian_shift(3.0, 1e-5), 1.0, 1)], 1e-5) == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize(
    "name",
    [
        *(f"audit.{one}" for one in ("bound", "curve_bound", "gaussian_pair", "guesses", "plan_law")),
        "accounting.tradeoff",
    ],
)
def test_the_examples_of_the_documentation_hold(name: str) -> None:
    assert doctest.testmod(import_module(f"lightning_dp.{name}"), raise_on_error=False).failed == 0


@pytest.mark.parametrize(
    ("noise", "text"),
    [(0.15, "noise below 0.2 says next to nothing"), (1.0, "its accountant simulates, and has no curve")],
)
def test_a_claim_without_a_curve_is_said_and_not_computed_with(noise: float, text: str) -> None:
    correlation = str(Correlation.found("banded", steps=12, momentum=0.9, groups=4, bands=3))
    bins = {} if noise < 0.2 else {"sampling": "balls_in_bins", "expected_batch_size": 10, "noise": correlation}
    ledger = Ledger(plan(noise_multiplier=noise, **bins))
    ledger.charge()
    with pytest.raises(PrvFailureError, match=text):
        _Claim(ledger, 1.0, 1e-5).curve_with(1.0)
