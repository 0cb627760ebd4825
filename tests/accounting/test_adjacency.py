"""Between which data sets the guarantee holds: N is the same for both, and what is not proved under zero-out is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, norm

from lightning_dp.accounting import Assumptions, Ledger, Statement
from lightning_dp.accounting.assumptions import SIZE_GIVEN, SIZE_READ, STEPS_READ
from lightning_dp.plan.correlation import Correlation
from lightning_dp.plan.privacy_plan import PrivacyPlan

NUMBERS: dict[str, Any] = {
    "noise_multiplier": 2.0, "clip_norm": 1.0, "delta": 1e-5, "dataset_size": 1000, "expected_batch_size": 100, "steps": 20,
}  # fmt: skip
GRID = np.linspace(-25.0, 15.0, 40_001)


def charged(plan: PrivacyPlan, steps: int = 20, **given: Any) -> Ledger:
    ledger = Ledger(plan, **given)
    for _ in range(steps):
        ledger.charge()
    return ledger


def density(means: Any, weights: Any, sigma: float) -> Any:
    return (norm.pdf(GRID[:, None], np.asarray(means, dtype=float), sigma) * np.asarray(weights)).sum(-1)


def sum_of_others(others: int, q: float, sigma: float, value: float | None) -> Any:
    """Density of a step's noised sum: others of −1, and one of ``value``, if it is there at all; each drawn with q."""
    count = np.arange(others + 1)
    weights = binom.pmf(count, others, q)
    if value is None:
        return density(-count, weights, sigma)
    return (1 - q) * density(-count, weights, sigma) + q * density(value - count, weights, sigma)


def delta(p: Any, q: Any, epsilon: float) -> float:
    return float(np.maximum(p - np.exp(epsilon) * q, 0.0).sum() * (GRID[1] - GRID[0]))


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("size", "batch"), [(2, 1), (10, 2), (20, 5)])
def test_with_n_held_an_example_that_adds_nothing_is_as_one_that_is_not_there(
    sigma: float, size: int, batch: int
) -> None:
    """Both relations have the pair that is accounted for; and one whose N, and so q, differs is not covered by it."""
    q = batch / size
    pair = density([0, 1], [1 - q, q], sigma), density([0], [1], sigma)
    whole = sum_of_others(size - 1, q, sigma, 1.0)
    removed, nothing = sum_of_others(size - 1, q, sigma, None), sum_of_others(size - 1, q, sigma, 0.0)
    assert np.allclose(removed, nothing, rtol=1e-9)
    for epsilon in (0.0, 0.5, 1.0):
        claimed = [delta(*pair, epsilon), delta(pair[1], pair[0], epsilon)]
        assert delta(whole, nothing, epsilon) <= claimed[0] + 1e-9
        assert delta(nothing, whole, epsilon) <= claimed[1] + 1e-9
    if size == 2:  # read from the data: the neighbour draws everybody else more often
        read = sum_of_others(size - 1, batch / (size - 1), sigma, None)
        assert delta(whole, read, 0.5) > 1.5 * max(delta(*pair, 0.5), delta(pair[1], pair[0], 0.5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sampling": "random_allocation", "participations": 2},
        {"sampling": "balls_in_bins"},
        {"sampling": "cyclic_poisson", "noise": str(Correlation.found("banded", steps=20, momentum=0.9, groups=10, bands=4))},
        {"clipping": "automatic", "resolution": 2**30, "coordinates": 10},
    ],
    ids=lambda options: str(options.get("sampling", "poisson")),
)  # fmt: skip
def test_epsilon_is_the_same_under_both_and_the_statement_names_the_one(options: dict[str, Any]) -> None:
    plan = PrivacyPlan(**{**NUMBERS, **options})
    both = [charged(plan), charged(plan.but(adjacency="zero_out"))]
    assert both[0].epsilon() == both[1].epsilon()
    said = [Statement.of(one, randomness="secret", risk=False) for one in both]
    assert [one.neighbouring_relation for one in said] == [
        "add/remove one example with N public",
        "zero out one example with N constant",
    ]
    assert ")-DP, zero out one example with N constant, " in str(said[1])
    state = json.loads(json.dumps(both[1].state_dict()))
    assert [phase["adjacency"] for phase in state["phases"]] == ["zero_out"]
    again = Ledger.resume(both[1].plan, state, stretch=state["phases"][0]["stretch"] or None)
    assert (again.state_dict(), again.epsilon()) == (state, both[1].epsilon())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": "replace"}, "adjacency='replace': expected one of 'add_remove', 'zero_out'"),
        ({"adjacency": None}, "adjacency=None: expected one of"),
        (
            {"adjacency": "zero_out", "max_batch_size": 300},
            "adjacency='zero_out' with max_batch_size=300: expected draws",
        ),
        (
            {"adjacency": "zero_out", "clipping": "quantile"},
            "adjacency='zero_out' with clipping='quantile': expected a",
        ),
        ({"adjacency": "zero_out", "clipping": "slaclip"}, "adjacency='zero_out' with clipping='slaclip': expected a"),
    ],
)
def test_what_is_not_proved_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivacyPlan(**{**NUMBERS, **options})


@pytest.mark.parametrize("first", ["add_remove", "zero_out"])
def test_a_training_goes_on_under_its_own_relation(first: str) -> None:
    plan = PrivacyPlan(**NUMBERS)
    state = charged(plan.but(adjacency=first), 2).state_dict()
    other = {"add_remove": "zero_out", "zero_out": "add_remove"}[first]
    with pytest.raises(
        ValueError, match=f"adjacency='{other}' after steps with '{first}': expected the same throughout"
    ):
        Ledger.resume(plan.but(adjacency=other), state)
    for phase in state["phases"]:
        del phase["adjacency"], phase["sizes"]  # as earlier versions wrote it
    assert Ledger.resume(plan, state).steps == 2


def test_where_n_and_t_come_from_stays_in_the_caveats() -> None:
    plan = PrivacyPlan(**NUMBERS)
    given = charged(plan, assumed=Assumptions(sizes=(SIZE_GIVEN,)))
    assert given.notes == ("N = 1000 was given, and is taken to follow from nobody's data",)
    read = charged(plan, assumed=Assumptions(sizes=(SIZE_READ, STEPS_READ)))
    assert [note[:60] for note in read.notes] == [
        "N = 1000 was read from the training data and counts as publi",
        "the number of steps follows from the length of the training ",
    ]
    assert "so does q, which" in read.notes[0]
    blocks = charged(plan.but(sampling="balls_in_bins"), assumed=Assumptions(sizes=(SIZE_READ,)))
    assert any("so does q and the divisor, which" in note for note in blocks.notes)
    constant = charged(plan.but(adjacency="zero_out"), assumed=Assumptions(sizes=(SIZE_READ, STEPS_READ)))
    assert constant.notes == (
        "N = 1000 was read from the training data, and all neighbours have it: how many there are is not protected",
    )
    later = Ledger.resume(plan, read.state_dict(), Assumptions(sizes=(SIZE_GIVEN,)))
    assert {*read.notes, *given.notes} <= set(later.notes)
    assert charged(plan).notes == ()  # by hand, where nobody says
    assert repr(Assumptions(sizes=(SIZE_READ,))) == repr(Assumptions())  # it enters the key of no run
