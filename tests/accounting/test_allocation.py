"""Blocks of which each example is in exactly one step: ε against integrals, simulation, the Gaussian mechanism and PRV."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution

from lightning_dp.accounting import Ledger, Phase, epsilon_bound
from lightning_dp.accounting.allocation_moments import MOST, _added, _removed, allocation_log_moments
from lightning_dp.accounting.calibrate import noise_for
from lightning_dp.accounting.epsilon import few, gaussian_epsilon, pool
from lightning_dp.accounting.likelihood_ratio import RatioLaw, _by_halves, _by_power, _means, allocation_law
from lightning_dp.accounting.phase import phase_of, phase_of_numbers
from lightning_dp.accounting.pld import pld_bound, pld_delta
from lightning_dp.accounting.rdp import FloatArray, rdp_epsilon
from lightning_dp.accounting.search import RandomNumber, search_epsilon
from lightning_dp.plan.privacy_plan import PrivacyPlan


def hockey_sticks(law: RatioLaw, epsilon: float) -> tuple[float, float]:
    """Of both directions, in closed form from a law of the likelihood ratio."""
    factor = math.exp(epsilon)
    removed = law.infinite + float(np.sum(np.maximum(law.with_it - factor * law.without_it, 0.0)))
    return removed, law.zero + float(np.sum(np.maximum(law.without_it - factor * law.with_it, 0.0)))


def ratio(x: FloatArray, sigma: float) -> FloatArray:
    """dP/dQ at outputs ``(..., k)``."""
    return np.asarray(np.mean(np.exp((2.0 * x - 1.0) / (2.0 * sigma**2)), -1))


@pytest.mark.parametrize("sigma", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0, 2.5])
def test_two_steps_agree_with_the_integral_over_the_plane(sigma: float, epsilon: float) -> None:
    axis = np.linspace(-9.0 * sigma, 9.0 * sigma + 1.0, 2001)
    x = np.stack(np.meshgrid(axis, axis), -1)
    weight = np.exp(-np.sum(x**2, -1) / (2.0 * sigma**2)) / (2.0 * math.pi * sigma**2) * (axis[1] - axis[0]) ** 2
    s = ratio(x, sigma)
    exact = [
        float(np.sum(weight * np.maximum(term, 0.0))) for term in (s - math.exp(epsilon), 1 - math.exp(epsilon) * s)
    ]
    found = hockey_sticks(allocation_law(sigma, 2, 1e-9), epsilon)
    for bound, value in zip(found, exact, strict=True):
        assert value - 1e-6 <= bound <= value + 5e-4 * value + 2e-6


@pytest.mark.parametrize(("sigma", "block", "blocks"), [(1.0, 5, 3), (0.6, 40, 1), (2.0, 12, 6)])
@pytest.mark.parametrize("fixed", [False, True])
def test_composed_blocks_agree_with_simulation(sigma: float, block: int, blocks: int, fixed: bool) -> None:
    """The best attack there is, the likelihood ratio's, simulated: with a step drawn anew, or the same, in each block."""
    count, generator = 60_000, np.random.default_rng(0)
    noise = sigma * generator.standard_normal((count, blocks, block))
    with_it = noise.copy()
    with_it[..., 0] += 1.0  # which step it is makes no difference
    if fixed:
        log_ratio = [np.log(ratio(x.mean(1), sigma / math.sqrt(blocks))) for x in (with_it, noise)]
    else:
        log_ratio = [np.log(ratio(x, sigma)).sum(-1) for x in (with_it, noise)]
    phase = phase_of_numbers(sigma, 1 / block, block * blocks, "balls_in_bins" if fixed else "random_allocation")
    for epsilon in (0.1, 0.5, 1.5):
        sides = [np.maximum(-np.expm1(epsilon - loss), 0.0) for loss in (log_ratio[0], -log_ratio[1])]
        means, errors = [x.mean() for x in sides], [x.std() / math.sqrt(count) for x in sides]
        bound = pld_delta([phase], epsilon, 1e-8)
        larger = int(means[1] > means[0])
        assert abs(bound - means[larger]) <= 4.5 * errors[larger] + 1e-5
        assert bound >= max(mean - 4.5 * error for mean, error in zip(means, errors, strict=True))


@pytest.mark.parametrize(("sigma", "block", "times"), [(0.8, 3, 2), (1.0, 4, 3)])
def test_several_participations_in_a_block_agree_with_simulation(sigma: float, block: int, times: int) -> None:
    """The likelihood ratio of t random steps of tk is a mean over sets of steps; t blocks of k bound it, closely."""
    count, generator, steps = 60_000, np.random.default_rng(0), block * times
    noise = sigma * generator.standard_normal((count, steps))
    with_it = noise.copy()
    with_it[:, :times] += 1.0  # which they are makes no difference

    def log_ratio(x: FloatArray) -> FloatArray:
        each = np.exp((2.0 * x - 1.0) / (2.0 * sigma**2))
        sums = [np.ones(count), *[np.zeros(count)] * times]  # elementary symmetric polynomials
        for step in range(steps):
            sums = [sums[0], *(sums[i] + sums[i - 1] * each[:, step] for i in range(1, times + 1))]
        return np.asarray(np.log(sums[times] / math.comb(steps, times)))

    phase = phase_of_numbers(sigma, 1 / block, steps, "random_allocation", times)
    assert phase == Phase(sigma, 1 / block, times, "allocation")
    for epsilon in (0.1, 0.5, 1.5):
        sides = [np.maximum(-np.expm1(epsilon - loss), 0.0) for loss in (log_ratio(with_it), -log_ratio(noise))]
        best = max(float(x.mean() - 4.5 * x.std() / math.sqrt(count)) for x in sides)
        assert best <= pld_delta([phase], epsilon, 1e-8) <= 1.5 * best + 0.01
        assert pld_delta([Phase(sigma, 1 / block, 1, "allocation")], epsilon, 1e-8) < best  # one of them is not enough


def test_two_ways_to_the_same_law() -> None:
    """By Fourier transform on equal cells, and two by two on uneven ones."""
    for sigma, steps in [(1.5, 12), (3.0, 50)]:
        fast, slow = _by_power(sigma, steps, 1e-9), _by_halves(sigma, steps, 1e-9)
        assert fast is not None
        for epsilon in (0.0, 0.2, 0.7):
            for a, b in zip(hockey_sticks(fast, epsilon), hockey_sticks(slow, epsilon), strict=True):
                assert a == pytest.approx(b, rel=5e-3, abs=1e-8)


def test_means_are_spread_with_their_mean_and_mass_kept() -> None:
    """On points of few bits, of equal laws (each pair once) and of two: against all pairs one by one."""
    a, b = (allocation_law(sigma, steps, 1e-9) for sigma, steps in ((0.4, 2), (0.3, 3)))
    for one, other, share in ((a, a, 0.5), (a, b, 0.4), (a, RatioLaw(*vars(a).values()), 0.5)):
        points, mass, zero = _means(one, other, share)
        pairs = (
            np.add.outer(share * one.ratio, (1 - share) * other.ratio),
            np.multiply.outer(one.without_it, other.without_it),
        )
        alone = share * one.ratio, one.without_it * other.zero, (1 - share) * other.ratio, other.without_it * one.zero
        for power in (0, 1):
            exact = float(np.sum(pairs[1] * pairs[0] ** power))
            exact += float(np.sum(alone[1] * alone[0] ** power) + np.sum(alone[3] * alone[2] ** power))
            assert float(np.sum(mass * points**power)) == pytest.approx(exact, rel=1e-11)
        assert zero == one.zero * other.zero
        for strike in (0.1, 1.0, 30.0):  # spread: no convex function expects less, and hardly more
            exact = float(np.sum(pairs[1] * np.maximum(pairs[0] - strike, 0.0)))
            exact += float(np.sum(alone[1] * np.maximum(alone[0] - strike, 0.0)))
            exact += float(np.sum(alone[3] * np.maximum(alone[2] - strike, 0.0)))
            found = float(np.sum(mass * np.maximum(points - strike, 0.0)))
            assert exact * (1 - 1e-12) <= found <= exact * (1 + 1e-3)


@pytest.mark.parametrize(("sigma", "block"), [(100.0, 3), (2000.0, 2), (0.3, 10**6)])
def test_much_noise_on_few_steps_and_long_blocks_have_a_law(sigma: float, block: int) -> None:
    bound = epsilon_bound([Phase(sigma, 1 / block, 5, "allocation")], 1e-5)
    assert 0.0 <= bound.epsilon < gaussian_epsilon([Phase(sigma, 1.0, 5)], 1e-5) + 1e-9


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
def test_renyi_moments_agree_with_integrals_and_closed_forms(sigma: float) -> None:
    axis = np.linspace(-14.0 * sigma - 8.0, 14.0 * sigma + 8.0, 3001)
    x = np.stack(np.meshgrid(axis, axis), -1)
    weight = np.exp(-np.sum(x**2, -1) / (2.0 * sigma**2)) / (2.0 * math.pi * sigma**2) * (axis[1] - axis[0]) ** 2
    s = ratio(x, sigma)
    for order in (1, 2, 3):
        exact = math.log(float(np.sum(weight * s ** (order + 1.0)))), math.log(float(np.sum(weight * s ** (-order))))
        found = float(_removed(sigma, 2)[order]), float(_added(sigma, 2)[order])
        assert found == pytest.approx(exact, rel=1e-6)
        assert max(exact) <= allocation_log_moments(sigma, 2)[order] <= max(exact) * (1 + 1e-6) + 2e-9
    for steps in (3, 10, 1000):
        assert _removed(sigma, steps)[1] == pytest.approx(math.log1p(math.expm1(1 / sigma**2) / steps), rel=1e-9)
    known = np.arange(MOST + 1.0) * np.arange(1.0, MOST + 2.0) / (2 * sigma**2)
    for moments in (_removed(sigma, 1), _added(sigma, 1)):
        assert moments == pytest.approx(known, rel=1e-8, abs=1e-9)


def test_renyi_accounting_and_searches_see_the_amplification() -> None:
    for sigma, block, blocks in ((1.0, 10, 8), (3.0, 12, 12), (2.0, 400, 8), (0.45, 100, 1)):
        phases = [Phase(sigma, 1 / block, blocks, "allocation")]
        bound = epsilon_bound(phases, 1e-5).epsilon
        assert bound < rdp_epsilon(phases, 1e-5) < 1.2 * bound
        unamplified = [Phase(sigma, 1.0, blocks)]
        assert rdp_epsilon(phases, 1e-5) < 0.8 * gaussian_epsilon(unamplified, 1e-5)
        for number in get_args(RandomNumber):
            assert (
                bound
                < search_epsilon(phases, 1e-5, 20, number).epsilon
                < (0.8 * search_epsilon(unamplified, 1e-5, 20, number).epsilon)
            )


@pytest.mark.parametrize("law", ["poisson", "allocation"])
def test_a_block_of_one_step_is_the_gaussian_mechanism(law: str) -> None:
    phases = [Phase(2.0, 1.0, 20, law)]
    exact = gaussian_epsilon([Phase(2.0, 1.0, 20)], 1e-5)
    assert exact <= pld_bound(phases, 1e-5) <= exact + 0.01


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), [(3.0, 0.08192, 875, 1e-5), (0.8, 0.002, 3000, 1e-8)])
def test_poisson_steps_agree_with_prv(sigma: float, q: float, steps: int, delta: float) -> None:
    prv = epsilon_bound([Phase(sigma, q, steps)], delta)
    assert prv.accountant == "PRV"
    assert prv.epsilon - 0.012 <= pld_bound([Phase(sigma, q, steps)], delta) <= prv.epsilon
    mixed = epsilon_bound([Phase(sigma, q, steps), Phase(5.0, 0.1, 1, "allocation")], delta)
    assert mixed.accountant == "PLD"
    assert mixed.epsilon > prv.epsilon - 0.012


def test_blocks_agree_with_privacy_loss_distributions_of_dp_accounting() -> None:
    """Composition and conversion by another library, from the law of one block as two probability mass functions."""
    law = allocation_law(2.0, 10, 1e-9)
    names = range(len(law.ratio))
    theirs = privacy_loss_distribution.from_two_probability_mass_functions(
        dict(zip(names, np.log(np.maximum(law.without_it, 1e-300)), strict=True)),
        dict(zip(names, np.log(np.maximum(law.with_it, 1e-300)), strict=True)),
        value_discretization_interval=1e-3,
    )
    assert pld_bound([Phase(2.0, 0.1, 30, "allocation")], 1e-5) == pytest.approx(
        theirs.self_compose(30).get_epsilon_for_delta(1e-5), abs=0.03
    )


def test_the_authors_lower_bound_is_just_below() -> None:
    """As computed by ``random-allocation`` 1.0.5 of Feldman and Shenfeld for one block, to 0.005."""
    assert 1.380 <= epsilon_bound([Phase(0.6, 1 / 1000, 1, "allocation")], 1e-5).epsilon <= 1.390


def test_an_allocation_is_less_than_poisson_and_less_than_a_known_step() -> None:
    for sigma, block in [(1.0, 10), (3.0, 12), (2.0, 400)]:
        bound = epsilon_bound([Phase(sigma, 1 / block, 8, "allocation")], 1e-5).epsilon
        assert bound < epsilon_bound([Phase(sigma, 1 / block, 8 * block)], 1e-5).epsilon
        assert bound < gaussian_epsilon([Phase(sigma, 1.0, 8)], 1e-5)
        assert bound <= rdp_epsilon([Phase(sigma, 1 / block, 8, "allocation")], 1e-5)


def test_less_noise_shorter_and_more_blocks_cost_more() -> None:
    epsilons = [
        epsilon_bound([Phase(sigma, 1 / block, blocks, "allocation")], 1e-5).epsilon
        for sigma, block, blocks in [
            (3.0, 20, 5),
            (2.0, 20, 5),
            (2.0, 10, 5),
            (2.0, 10, 9),
            (0.3, 10, 9),
            (0.01, 10, 9),
        ]
    ]
    assert epsilons == sorted(epsilons)
    assert epsilon_bound([Phase(0.0, 0.1, 1, "allocation")], 1e-5).epsilon == math.inf
    assert epsilon_bound([Phase(1e5, 0.1, 1, "allocation")], 1e-5).epsilon == 0.0


def make_plan(**changes: object) -> PrivacyPlan:
    numbers = {
        "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-5, "dataset_size": 1000, "expected_batch_size": 100,
        "steps": 50, "sampling": "random_allocation",
    }  # fmt: skip
    return PrivacyPlan(**{**numbers, **changes})


def test_a_part_of_a_block_counts_as_the_whole() -> None:
    several = Ledger(make_plan(participations=2))
    assert several.epsilon(1) == several.epsilon(20) == Ledger(make_plan()).epsilon(20)
    assert several.epsilon(21) == several.epsilon(40) == Ledger(make_plan()).epsilon(40)
    ledger = Ledger(make_plan())
    bounds = [ledger.epsilon(steps).epsilon for steps in (0, 1, 9, 10, 11, 20, 21)]
    assert bounds[0] == 0.0 < bounds[1] == bounds[2] == bounds[3] < bounds[4] == bounds[5] < bounds[6]
    fixed = Ledger(make_plan(sampling="balls_in_bins"))
    assert fixed.epsilon(7) == ledger.epsilon(7)
    assert fixed.epsilon(11).epsilon == fixed.epsilon(20).epsilon > ledger.epsilon(20).epsilon


@pytest.mark.parametrize("sampling", ["random_allocation", "balls_in_bins"])
def test_randomness_that_begins_anew_is_composed_and_what_goes_on_is_not(sampling: str) -> None:
    first = Ledger(make_plan(sampling=sampling))
    first.begins("one")
    for _ in range(7):
        first.charge()
    anew, on = (Ledger.resume(first.plan, first.state_dict(), stretch=name) for name in ("two", "one"))
    for _ in range(3):
        anew.charge()
        on.charge()
    assert (anew.begun_at, on.begun_at) == (7, 0)
    mechanism = first.plan.mechanism
    assert on.phases == (phase_of(mechanism, 10),)
    assert on.epsilon() == epsilon_bound([phase_of(mechanism, 10)], 1e-5)
    assert anew.epsilon() == epsilon_bound([phase_of(mechanism, 7), phase_of(mechanism, 3)], 1e-5)
    assert anew.epsilon().epsilon > on.epsilon().epsilon
    assert [entry["steps"] for entry in anew.state_dict()["phases"]] == [7, 3]
    assert [entry["steps"] for entry in on.state_dict()["phases"]] == [10]
    # Steps of one stretch that a journal tells of later belong to it, wherever they stand.
    state = anew.state_dict()
    state["phases"].append({**state["phases"][0], "steps": 5})
    later = Ledger.resume(first.plan, state)
    assert later.epsilon() == epsilon_bound([phase_of(mechanism, 12), phase_of(mechanism, 3)], 1e-5)
    assert Ledger.resume(first.plan, later.state_dict()).epsilon() == later.epsilon()


def test_the_default_is_that_randomness_begins_anew() -> None:
    first = Ledger(make_plan())
    first.charge()
    second = Ledger.resume(first.plan, first.state_dict())
    second.charge()
    assert second.epsilon() == epsilon_bound([phase_of(first.plan.mechanism, 20)], 1e-5)


def test_the_step_that_overspends_is_the_first_of_a_block() -> None:
    target = Ledger(make_plan()).epsilon(30).epsilon
    ledger = Ledger(make_plan(target_epsilon=target, steps=30))
    assert ledger.affordable_steps == 30
    for _ in range(30):
        ledger.charge()
    assert not ledger.can_charge()


@pytest.mark.parametrize("sampling", ["random_allocation", "balls_in_bins"])
def test_calibration_reaches_its_target(sampling: str) -> None:
    mechanism = make_plan(sampling=sampling).mechanism
    history = [Phase(4.0, 0.05, 20)]
    sigma = noise_for(3.0, 1e-5, lambda s: phase_of(mechanism.but(noise_multiplier=s), 50), history)
    bound = epsilon_bound([*history, phase_of(mechanism.but(noise_multiplier=sigma), 50)], 1e-5).epsilon
    assert 3.0 * 0.995 <= bound <= 3.0


def test_phases_of_two_laws_are_kept_apart() -> None:
    phases = [Phase(1.0 + i / 100, 0.1, 1, law) for i in range(40) for law in ("poisson", "allocation")]
    together = few(pool(phases))
    assert {phase.law for phase in together} == {"poisson", "allocation"}
    assert [sum(p.steps for p in together if p.law == law) for law in ("poisson", "allocation")] == [40, 40]
    assert pool([Phase(1.0, 0.1, 1), Phase(1.0, 0.1, 1, "allocation")])[1].law == "allocation"


def test_blocks_of_no_whole_number_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match=r"sampling_probability=0.3: expected 1/k .*Give 1/3"):
        Phase(1.0, 0.3, 1, "allocation")
    with pytest.raises(
        ValueError, match=r"expected_batch_size=300 .*sampling='balls_in_bins': expected a block of a whole"
    ):
        make_plan(expected_batch_size=300, sampling="balls_in_bins")
    with pytest.raises(
        ValueError,
        match=r"sampling='shuffle': expected one of 'poisson', 'cyclic_poisson', 'random_allocation', 'balls_in_bins'",
    ):
        make_plan(sampling="shuffle")
