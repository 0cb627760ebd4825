"""The lower bound is valid for mechanisms of known ε, and finds out those that are far weaker than claimed."""

from __future__ import annotations

import doctest
import math
from importlib import import_module

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_dp.accounting import Phase
from lightning_dp.accounting.epsilon import gaussian_epsilon
from lightning_dp.audit.bound import epsilon_lower_bound, p_value
from lightning_dp.audit.guesses import guess, planned_guesses

FALSE_ALARM = 1e-6


def randomised_response(epsilon: float, delta: float, canaries: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of the (ε, δ)-private mechanism that is easiest to guess, with each canary's own sureness.

    With probability δ the coin is revealed outright; else it is reported rightly with probability 1 / (1 + e^-ε).
    """
    generator = np.random.default_rng(seed)
    members = generator.random(canaries) < 0.5
    lies = generator.random(canaries) > 1 / (1 + math.exp(-epsilon))
    revealed = generator.random(canaries) < delta
    sureness = 1 + generator.random(canaries) + 10 * revealed
    return np.where(members ^ (lies & ~revealed), sureness, -sureness), members


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 1e-5), (1.0, 1e-2), (3.0, 1e-5), (0.0, 0.05)])
@pytest.mark.parametrize("guesses", [20, 100, 400])
def test_the_bound_exceeds_the_true_epsilon_no_more_often_than_it_may(
    epsilon: float, delta: float, guesses: int
) -> None:
    failures, audits, level = 0, 400, 0.2
    for seed in range(audits):
        made = guess("", *randomised_response(epsilon, delta, 400, seed), guesses)
        failures += p_value(400, guesses, made.correct, epsilon, delta) < level
    assert stats.binom.sf(failures - 1, audits, level) > FALSE_ALARM


def test_a_bound_without_the_share_of_delta_would_be_wrong_and_the_check_would_see_it() -> None:
    failures, audits = 0, 400
    for seed in range(audits):
        made = guess("", *randomised_response(1.0, 0.2, 400, seed), 100)
        failures += p_value(400, 100, made.correct, 1.0, 0.0) < 0.2
    assert stats.binom.sf(failures - 1, audits, 0.2) < 1e-12


@pytest.mark.parametrize("epsilon", [1.0, 3.0])
def test_a_mechanism_far_weaker_than_claimed_is_refuted(epsilon: float) -> None:
    for seed in range(20):
        made = guess("", *randomised_response(3 * epsilon, 1e-5, 4000, seed), 1000)
        assert epsilon_lower_bound(4000, 1000, made.correct, 1e-5, 0.99) > epsilon


def test_the_bound_of_a_gaussian_mechanism_stays_below_its_epsilon() -> None:
    generator, claimed = np.random.default_rng(0), gaussian_epsilon([Phase(1.0, 1.0, 1)], 1e-5)
    guesses = planned_guesses(2000, claimed, 1e-5)
    bounds = []
    for _ in range(20):
        members = generator.random(2000) < 0.5
        made = guess("", members + generator.standard_normal(2000), members, guesses)
        bounds.append(epsilon_lower_bound(2000, guesses, made.correct, 1e-5))
    assert max(bounds) < claimed
    assert np.mean(bounds) > 0.3 * claimed


def by_definition(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2 written out sum by sum."""
    accuracy = math.exp(epsilon) / (1 + math.exp(epsilon))
    mass = [math.comb(guesses, k) * accuracy**k * (1 - accuracy) ** (guesses - k) for k in range(guesses + 1)]
    alpha = max((sum(mass[max(0, correct - i) : correct]) / i for i in range(1, canaries + 1)), default=0.0)
    return min(1.0, sum(mass[correct:]) + 2 * canaries * delta * alpha)


@given(
    guesses=st.integers(0, 30), abstained=st.integers(0, 20), right=st.floats(0, 1), epsilon=st.floats(0, 6),
    delta=st.floats(0, 0.1),
)  # fmt: skip
def test_the_p_value_is_the_written_out_theorem(
    guesses: int, abstained: int, right: float, epsilon: float, delta: float
) -> None:
    correct = round(right * guesses)
    expected = by_definition(guesses + abstained, guesses, correct, epsilon, delta)
    assert p_value(guesses + abstained, guesses, correct, epsilon, delta) == pytest.approx(expected, abs=1e-9)


@given(guesses=st.integers(1, 200), right=st.floats(0, 1), confidence=st.floats(0.5, 0.999))
def test_the_bound_is_where_the_p_value_crosses_the_level(guesses: int, right: float, confidence: float) -> None:
    correct = round(right * guesses)
    bound = epsilon_lower_bound(300, guesses, correct, 1e-5, confidence)
    if bound > 0:
        assert p_value(300, guesses, correct, max(0.0, bound - 1e-5), 1e-5) < 1 - confidence
    assert p_value(300, guesses, correct, bound + 1e-5, 1e-5) >= 1 - confidence
    more = epsilon_lower_bound(300, guesses, guesses, 1e-5, confidence)
    assert more >= bound - 1e-5


def test_guesses_are_the_extreme_scores() -> None:
    scores, members = np.array([3.0, -1.0, 0.1, 5.0, -9.0, 0.0]), np.array([True, True, False, True, False, False])
    assert guess("a", scores, members, 4).correct == 3
    assert guess("a", scores, members, 2).correct == 2
    assert guess("a", scores, members, 99).guesses == 6
    assert guess("a", np.full(6, np.nan), members, 6).guesses == 6


@pytest.mark.parametrize(("guesses", "correct"), [(5, 6), (11, 3), (-1, 0), (5, -1)])
def test_impossible_counts(guesses: int, correct: int) -> None:
    with pytest.raises(ValueError, match=rf"correct={correct}, guesses={guesses}, canaries=10: expected"):
        p_value(10, guesses, correct, 1.0, 1e-5)


@pytest.mark.parametrize("confidence", [0.0, 1.0, math.nan])
def test_a_confidence_out_of_range(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"confidence=.*: expected a number in \(0, 1\)"):
        epsilon_lower_bound(10, 5, 5, 1e-5, confidence)


@pytest.mark.parametrize("module", ["lightning_dp.audit.bound", "lightning_dp.accounting.compare"])
def test_the_examples_of_the_documentation_hold(module: str) -> None:
    assert doctest.testmod(import_module(module), raise_on_error=False).failed == 0
