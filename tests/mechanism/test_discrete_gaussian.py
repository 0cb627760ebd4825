"""Discrete Gaussian noise has its law, exactly; the check of the law rejects slightly wrong ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lightning_dp.mechanism import keystream
from lightning_dp.mechanism.discrete_gaussian import _POWERS, SURE, Integers, _Candidates, discrete_gaussian
from lightning_dp.mechanism.keystream import Keystream, LazyUniform, MissingSecureExtraError
from lightning_dp.mechanism.randomness import RandomKey, Stream
from lightning_dp.mechanism.sampling import exact_poisson_sample
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, poisson_sampling_p_values, standard_normal_p_values

KEY = RandomKey.from_seed(71)
SAMPLES = 300_000
SMALL = [Fraction(1, 4), Fraction(1, 2), Fraction(3), Fraction(203, 5)]
LARGE = Fraction(1.37) ** 2 * 2**60


def stream(step: int = 0) -> Keystream:
    return Keystream.of(KEY, Stream.NOISE, step)


def exactly(exponent: Fraction, bits: int = 64) -> int:
    """⌊exp(-exponent)·2^bits⌋, by far more digits than it has."""
    with localcontext() as context:
        context.prec = 120
        return int((-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp() * 2**bits)


def p_value(samples: Integers, variance: Fraction) -> float:
    """Pearson's chi-square against the exact probabilities, rare values pooled at both ends."""
    reach = math.ceil(12 * math.sqrt(variance)) + 3
    k = np.arange(-reach, reach + 1)
    weight = np.exp(-(k**2) / (2 * float(variance)))
    expected = weight / math.fsum(weight) * len(samples)
    low, high = np.flatnonzero(expected >= 10)[[0, -1]]
    observed = np.bincount(np.clip(samples + reach, low, high), minlength=high + 1)[low : high + 1]
    pooled = expected[low : high + 1].copy()
    pooled[0] += expected[:low].sum()
    pooled[-1] += expected[high + 1 :].sum()
    return float(stats.chisquare(observed, pooled * len(samples) / pooled.sum()).pvalue)


@pytest.mark.parametrize("variance", SMALL, ids=str)
def test_small_noise_has_the_exact_probabilities(variance: Fraction) -> None:
    assert p_value(discrete_gaussian(variance, SAMPLES, stream()), variance) > FALSE_ALARM


WRONG: dict[str, Callable[[Integers, Fraction], Integers]] = {
    "3 % too much variance": lambda x, v: discrete_gaussian(v * Fraction(103, 100), SAMPLES, stream(1)),
    "3 % too little variance": lambda x, v: discrete_gaussian(v * Fraction(97, 100), SAMPLES, stream(1)),
    "-0 is kept": lambda x, v: np.concatenate([x, np.zeros((x == 0).sum(), dtype=np.int64)]),
    "shifted once in 20": lambda x, v: x + (np.arange(len(x)) % 20 == 0),
    "never negative by one": lambda x, v: np.where(x == -1, 0, x),
    "a rounded Gaussian": lambda x, v: np.rint(np.random.default_rng(3).normal(size=SAMPLES) * math.sqrt(v)).astype(
        int
    ),
}


@pytest.mark.parametrize("fault", WRONG)
def test_the_check_of_the_law_rejects_wrong_noise(fault: str) -> None:
    for variance in (Fraction(1, 2), Fraction(3)) if fault != "a rounded Gaussian" else (Fraction(1, 2),):
        wrong = WRONG[fault](discrete_gaussian(variance, SAMPLES, stream()), variance)
        assert p_value(wrong, variance) < CAUGHT, variance


def large_noise_p_values(samples: Integers, variance: Fraction = LARGE) -> dict[str, float]:
    """As a Gaussian, and with lowest bits that are fair coins."""
    low = np.bincount(samples & 255, minlength=256)
    return {
        **standard_normal_p_values(samples / math.sqrt(variance)),
        "lowest bits": float(stats.chisquare(low).pvalue),
    }


def test_noise_of_the_size_used_is_gaussian_down_to_the_last_bit() -> None:
    samples = discrete_gaussian(LARGE, 200_000, stream())
    assert min(large_noise_p_values(samples).values()) > FALSE_ALARM
    in_floats = np.rint(np.random.default_rng(0).standard_normal(200_000, np.float32) * np.float32(LARGE**0.5))
    assert large_noise_p_values(in_floats.astype(np.int64))["lowest bits"] < CAUGHT
    assert large_noise_p_values(samples * 103 // 100)["variance"] < CAUGHT


@given(
    variance=st.fractions(Fraction(1, 100), 10**6, max_denominator=1000),
    u=st.integers(0, 2**30),
    v=st.integers(0, 60),
    bits=st.integers(0, 30),
)
def test_a_candidates_chance_times_its_acceptance_is_the_law(variance: Fraction, u: int, v: int, bits: int) -> None:
    """V + U/t + (k - s²/t)²/2s² = k²/2s² + a constant, for every k = U + tV and every t."""
    t = 2**bits
    k = u + t * v
    assert v + Fraction(u, t) + (k - variance / t) ** 2 / (2 * variance) == (k**2 + (variance / t) ** 2) / (
        2 * variance
    )


@pytest.mark.parametrize("variance", [*SMALL, LARGE], ids=str)
def test_every_decision_falls_at_the_exact_threshold(variance: Fraction) -> None:
    """One unit of 2⁻⁶⁴ on either side of e to the exact exponent, for candidates of all sizes."""
    candidates = _Candidates(variance, stream(), SURE)
    t = candidates.t
    u = np.array([0, t // 3, t - 1] * 5, dtype=np.int64)
    size = u + t * np.repeat([0, 1, 2, 5, 7], 3)
    exponent = u / t + (size - float(variance / t)) ** 2 / float(2 * variance)
    exact = [
        exactly(Fraction(int(a), t) + (int(k) - variance / t) ** 2 / (2 * variance))
        for a, k in zip(u, size, strict=True)
    ]
    for offset, below in ((-1, True), (1, False)):
        usable = [0 <= threshold + offset < 2**64 for threshold in exact]
        words = np.array(
            [threshold + offset if ok else 0 for threshold, ok in zip(exact, usable, strict=True)], dtype=np.uint64
        )
        answers = candidates._below_exp(words, exponent, u, size)
        assert (answers == below)[usable].all()
    assert sum(usable) >= 8


@pytest.mark.parametrize("variance", [Fraction(1, 2), Fraction(203, 5), LARGE], ids=str)
def test_floating_point_never_decides_otherwise_than_exact_arithmetic(variance: Fraction) -> None:
    by_floats = discrete_gaussian(variance, 1500, stream())
    exact = discrete_gaussian(variance, 1500, stream(), sure=1e30)
    assert np.array_equal(by_floats, exact)


def test_the_geometric_part_falls_at_its_exact_thresholds() -> None:
    candidates = _Candidates(Fraction(3), stream(), SURE)
    powers = [exactly(Fraction(k)) for k in range(1, 45)]
    assert sorted(powers) == _POWERS.tolist()
    for offset, v in ((-1, 1), (1, 0)):
        words = np.array([power + offset for power in powers if power > 2], dtype=np.uint64)
        assert candidates._geometric(words).tolist() == [k + v for k in range(len(words))]
    ties = np.array([*powers[:30], 0], dtype=np.uint64)
    found = candidates._geometric(ties)
    assert {int(a) - k for k, a in enumerate(found[:-1])} == {0, 1}  # further bits decide, either way
    assert found[-1] >= 44


class Given:
    """A stream of given words, in place of a key stream."""

    def __init__(self, *words: int) -> None:
        self.left = list(words)

    def words(self, count: int) -> Any:
        taken, self.left = self.left[:count], self.left[count:]
        return np.array(taken, dtype=np.uint64)


@given(exponent=st.fractions(0, 50, max_denominator=10**12), extra=st.integers(0, 2**64 - 1))
def test_a_tie_is_broken_by_further_bits(exponent: Fraction, extra: int) -> None:
    word, further = exactly(exponent), exactly(exponent, 128) & (2**64 - 1)
    if word == 2**64:  # exp(-0): every number is below 1
        assert LazyUniform(2**64 - 1, Given()).below_exp(exponent)
        word, further = 2**64 - 1, 2**64
    if extra != further:
        assert LazyUniform(word, Given(extra)).below_exp(exponent) == (extra < further)
    threshold = Fraction(exactly(exponent, 100), 2**100)
    word, further = int(threshold * 2**64), int(threshold * 2**128) & (2**64 - 1)
    assert LazyUniform(word, Given(extra)).below(threshold) == (extra < further)


def test_a_key_stream_is_one_of_its_key_stream_and_step_alone() -> None:
    key, other = RandomKey.fresh(), RandomKey.fresh()
    places = [(k, s, step) for k in (key, other) for s in Stream for step in (0, 1)]
    first = {bytes(Keystream.of(*place).words(4)) for place in places} | {
        bytes(Keystream.of(*place).spare.words(4)) for place in places
    }
    assert len(first) == 2 * len(places)
    whole = Keystream.of(key, Stream.NOISE, 0).words(50)
    parts = Keystream.of(key, Stream.NOISE, 0)
    parts.spare.words(7)
    assert np.array_equal(np.concatenate([parts.words(20), parts.words(30)]), whole)


def test_the_words_are_those_of_the_standard() -> None:
    """NIST SP 800-38A, F.5.5: AES-256 in counter mode, with the counter at 0 in place of the standard's."""
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    counters = b"".join(counter.to_bytes(16, "big") for counter in range(3))
    assert Keystream(key).words(6).astype("<u8").tobytes() == block.update(counters)


def test_without_cryptography_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keystream, "find_spec", lambda name: None)
    with pytest.raises(MissingSecureExtraError, match=r"cryptography is not installed.*lightning-dp\[secure\]"):
        Keystream(bytes(32))


@pytest.mark.parametrize("variance", [Fraction(0), Fraction(-1), Fraction(2) ** 105])
def test_a_variance_without_a_law_is_refused(variance: Fraction) -> None:
    with pytest.raises(ValueError, match=r"variance=.*expected a number above 0"):
        discrete_gaussian(variance, 1, stream())


def exact_memberships(q: float, draws: int = 4000, examples: int = 60) -> np.ndarray[Any, np.dtype[np.bool_]]:
    members = np.zeros((draws, examples), dtype=bool)
    for step in range(draws):
        members[step, exact_poisson_sample(Keystream.of(KEY, Stream.SAMPLING, step), examples, q)] = True
    return members


def test_exact_sampling_is_an_independent_coin_for_every_example() -> None:
    assert min(poisson_sampling_p_values(exact_memberships(0.15), 0.15).values()) > FALSE_ALARM
    assert min(poisson_sampling_p_values(exact_memberships(0.16), 0.15).values()) < CAUGHT


@given(q=st.floats(1e-18, 1.0), above=st.integers(-2, 2))
def test_an_example_is_drawn_exactly_below_q(q: float, above: int) -> None:
    scaled = Fraction(q) * 2**64
    word = min(max(int(scaled) + above, 0), 2**64 - 1)
    given_words = Given(word)
    given_words.spare = Given(2**63)
    drawn = len(exact_poisson_sample(given_words, 1, q))
    assert drawn == (Fraction(2 * word + (word == int(scaled) != scaled), 2) < scaled)
