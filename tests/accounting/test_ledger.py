"""The ledger: every step counted once, none beyond the budget, nothing forgotten on resume."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from lightning_dp.accounting import BudgetExceededError, Ledger, Phase, epsilon_bound
from lightning_dp.accounting.epsilon import few, pool
from lightning_dp.accounting.ledger import MOST_ENTRIES, STATE_VERSION
from lightning_dp.accounting.statement import Statement
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests.nearly import assert_nearly


def make_plan(**changes: Any) -> PrivacyPlan:
    numbers: dict[str, Any] = {
        "noise_multiplier": 2.0,
        "clip_norm": 1.0,
        "delta": 1e-5,
        "dataset_size": 1000,
        "expected_batch_size": 100,
        "steps": 50,
        "target_epsilon": 2.5,
    }
    return PrivacyPlan(**{**numbers, **changes})


def charged_ledger(plan: PrivacyPlan, steps: int) -> Ledger:
    ledger = Ledger(plan)
    for _ in range(steps):
        ledger.charge()
    return ledger


def charge_all(ledger: Ledger) -> int:
    charged = 0
    while ledger.can_charge():
        ledger.charge()
        charged += 1
    return charged


@pytest.mark.parametrize("steps", [None, 3, 50, 5000])
def test_charges_up_to_the_budget_and_stops(steps: int | None) -> None:
    """Whatever was planned, charging ends at the last step whose ε is within the target."""
    ledger = Ledger(make_plan(steps=steps))
    charged = charge_all(ledger)
    assert ledger.steps == charged == ledger.affordable_steps
    assert ledger.epsilon().epsilon <= 2.5 < ledger.epsilon(charged + 1).epsilon
    with pytest.raises(BudgetExceededError, match=rf"target_epsilon=2.5: step {charged + 1} would take ε to"):
        ledger.charge()
    assert ledger.steps == charged


def test_without_a_target_every_step_is_charged() -> None:
    ledger = Ledger(make_plan(target_epsilon=None, noise_multiplier=0.0))
    assert ledger.epsilon().epsilon == 0
    ledger.charge()
    assert ledger.can_charge()
    assert ledger.affordable_steps is None
    assert ledger.epsilon().epsilon == math.inf


def test_without_noise_no_step_fits_a_target() -> None:
    ledger = Ledger(make_plan(noise_multiplier=0.0))
    assert not ledger.can_charge()
    assert ledger.affordable_steps == 0
    with pytest.raises(BudgetExceededError):
        ledger.charge()


def test_an_almost_free_mechanism_has_a_finite_count() -> None:
    assert Ledger(make_plan(noise_multiplier=1e6, steps=None)).affordable_steps == 10**9


def test_epsilon_at_any_number_of_steps() -> None:
    ledger = Ledger.resume(
        make_plan(noise_multiplier=3.0, target_epsilon=None), charged_ledger(make_plan(), 20).state_dict()
    )
    past = Phase(2.0, 0.1, 20)
    assert ledger.epsilon(0).epsilon == 0
    assert_nearly(ledger.epsilon(7).epsilon, epsilon_bound([Phase(2.0, 0.1, 7)], 1e-5).epsilon)
    assert ledger.epsilon(20).epsilon == pytest.approx(epsilon_bound([past], 1e-5).epsilon, abs=0.012)
    assert_nearly(ledger.epsilon(50), epsilon_bound([past, Phase(3.0, 0.1, 30)], 1e-5))
    assert_nearly(ledger.epsilon(), ledger.epsilon(20))
    with pytest.raises(ValueError, match="steps=-1"):
        ledger.epsilon(-1)


@pytest.mark.parametrize("cut", [0, 1, 31, 50])
def test_resuming_is_as_if_never_interrupted(cut: int) -> None:
    whole = charged_ledger(make_plan(), 50)
    first = charged_ledger(make_plan(), cut)
    second = Ledger.resume(make_plan(), json.loads(json.dumps(first.state_dict())))
    assert second.steps == cut
    for _ in range(50 - cut):
        second.charge()
    assert second.phases == whole.phases
    assert second.epsilon().epsilon == pytest.approx(whole.epsilon().epsilon, abs=1e-9)
    assert second.affordable_steps == whole.affordable_steps
    assert second.state_dict() == whole.state_dict()
    assert second.notes == ()


def test_spent_budget_survives_a_resume() -> None:
    full = Ledger(make_plan())
    charge_all(full)
    resumed = Ledger.resume(make_plan(), full.state_dict())
    assert not resumed.can_charge()
    assert resumed.affordable_steps == full.steps
    with pytest.raises(BudgetExceededError):
        resumed.charge()


def test_a_smaller_target_after_the_fact_stops_at_once() -> None:
    spent = charged_ledger(make_plan(), 30)
    resumed = Ledger.resume(make_plan(target_epsilon=0.5), spent.state_dict())
    assert not resumed.can_charge()
    assert resumed.epsilon().epsilon > 0.5


def test_a_changed_mechanism_is_composed() -> None:
    first = charged_ledger(make_plan(), 20)
    resumed = Ledger.resume(
        make_plan(noise_multiplier=4.0, expected_batch_size=200, steps=60, target_epsilon=6.0),
        first.state_dict(),
    )
    for _ in range(40):
        resumed.charge()
    assert resumed.phases == (Phase(2.0, 0.1, 20), Phase(4.0, 0.2, 40))
    assert_nearly(resumed.epsilon(), epsilon_bound(resumed.phases, 1e-5))
    assert any("changed during training" in note and "in advance" in note for note in resumed.notes)
    third = Ledger.resume(make_plan(target_epsilon=6.0, steps=None), resumed.state_dict())
    third.charge()
    assert third.phases == (Phase(2.0, 0.1, 20), Phase(4.0, 0.2, 40), Phase(2.0, 0.1, 1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"clip_norm": 2.0}, "clip norm changed during training from 1 to 2"),
        ({"clipping": "automatic"}, "clipping style changed during training from flat to automatic"),
        (
            {"dataset_size": 2000, "expected_batch_size": 200},
            "dataset size changed during training from 1000",
        ),
        ({"delta": 1e-6}, "δ changed during training from 1e-05 to 1e-06"),
    ],
)
def test_changes_that_do_not_change_the_mechanism_are_noted(changes: dict[str, Any], said: str) -> None:
    resumed = Ledger.resume(make_plan(**changes), charged_ledger(make_plan(), 20).state_dict())
    assert resumed.notes == ()
    resumed.charge()
    assert resumed.phases == (Phase(2.0, 0.1, 21),)
    assert resumed.epsilon().epsilon == pytest.approx(
        epsilon_bound(resumed.phases, resumed.plan.delta).epsilon, abs=0.012
    )
    assert len(resumed.notes) == 1
    assert said in resumed.notes[0]
    assert len(resumed.state_dict()["phases"]) == 2


def test_state_is_plain_numbers() -> None:
    state = charged_ledger(make_plan(), 3).state_dict()
    assert state == {
        "version": 2,
        "phases": [
            {
                "steps": 3,
                "noise_multiplier": 2.0,
                "sampling_probability": 0.1,
                "clip_norm": 1.0,
                "expected_batch_size": 100.0,
                "dataset_size": 1000,
                "delta": 1e-5,
                "max_batch_size": None,
                "resolution": None,
                "coordinates": None,
                "clipping": "flat",
                "automatic_gamma": None,
                "clip_quantile": None,
                "clip_learning_rate": None,
                "quantile_weight": None,
                "slack_bins": None,
                "unit": "example",
                "sampling": "poisson",
                "participations": 1,
                "adjacency": "add_remove",
                "sizes": [],
                "stretch": "",
                "noise": "independent",
                "gradient_filter": None,
                "filter_gain": None,
                "filter_lookahead": None,
                "row_wise": [],
                "public_state": [],
            }
        ],
    }
    plain = [value for value in state["phases"][0].values() if type(value) is not list]
    assert all(value is None or type(value) in (int, float, str) for value in plain)


def broken(path: str, value: Any) -> dict[str, Any]:
    state = copy.deepcopy(charged_ledger(make_plan(), 3).state_dict())
    if path in state:
        state[path] = value
    elif value is KeyError:
        del state["phases"][0][path]
    else:
        state["phases"][0][path] = value
    return state


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("version", 1, "version=1"),
        ("version", None, "version=None"),
        ("phases", None, "phases=None"),
        ("phases", [3], "expected"),
        ("steps", -3, "steps=-3"),
        ("steps", 3.5, "steps=3.5"),
        ("steps", True, "steps=True"),
        ("steps", KeyError, "expected"),
        ("surprise", 1, "surprise"),
        ("noise_multiplier", -1.0, "noise_multiplier=-1.0"),
        ("noise_multiplier", "2", "noise_multiplier='2'"),
        ("noise_multiplier", math.nan, "noise_multiplier=nan"),
        ("sampling_probability", 1.5, "sampling_probability=1.5"),
        ("clip_norm", 0.0, "clip_norm=0.0"),
        ("delta", 2.0, "delta=2.0"),
        ("dataset_size", 0, "dataset_size=0"),
        ("max_batch_size", 0, "max_batch_size=0"),
        ("max_batch_size", 1.5, "max_batch_size=1.5"),
        ("max_batch_size", True, "max_batch_size=True"),
        ("max_batch_size", KeyError, "expected"),
        ("resolution", 2**30, "coordinates=None"),
        ("resolution", -1, "resolution=-1"),
        ("coordinates", "7", "coordinates='7'"),
        ("clipping", "rounding", "clipping='rounding'"),
    ],
)
def test_a_bad_state_is_refused_and_changes_nothing(path: str, value: Any, said: str) -> None:
    ledger = charged_ledger(make_plan(), 2)
    with pytest.raises(ValueError, match=said) as caught:
        ledger.load_state_dict(broken(path, value))
    assert "Resume from a checkpoint" in str(caught.value)
    assert ledger.steps == 2
    with pytest.raises(ValueError, match="version=None"):
        ledger.load_state_dict({})


def test_thousands_of_forged_phases_are_bounded_from_above_in_time() -> None:
    """3,000 phases of different σ: ε is that of all at least noise and at most that of all at the least noise."""
    entry = Ledger(_plan_of(1.0)).numbers
    phases = [{**entry, "steps": 1, "noise_multiplier": 1.0 + number * 1e-3} for number in range(3000)]
    ledger = Ledger.resume(_plan_of(1.0), {"version": STATE_VERSION, "phases": phases})
    bound = ledger.epsilon()
    assert ledger.steps == 3000
    least = epsilon_bound([Phase(4.0, 0.1, 3000)], 1e-5).epsilon
    most = epsilon_bound([Phase(1.0, 0.1, 3000)], 1e-5).epsilon
    assert least < bound.epsilon < most
    assert bound.note is not None
    assert "3000 phases of other numbers were put together" in bound.note
    statement = Statement.of(ledger, randomness="secret")
    assert any("and 2968 more" in caveat for caveat in statement.caveats)
    assert statement.risk is not None
    assert least < statement.risk.epsilon_at_delta["1e-05"] < most


def test_more_stretches_than_any_training_has_are_refused() -> None:
    entry = Ledger(_plan_of(1.0)).numbers
    state = {"version": STATE_VERSION, "phases": [{**entry, "steps": 1}] * (MOST_ENTRIES + 1)}
    with pytest.raises(ValueError, match=r"10001 phases in the ledger's state: expected at most 10000"):
        Ledger.resume(_plan_of(1.0), state)


@pytest.mark.parametrize("most", [1, 3, 8])
def test_phases_put_together_lose_no_less_privacy(most: int) -> None:
    phases = pool(Phase(1.0 + number / 4, 0.05 + number % 3 / 50, 2 + number) for number in range(9))
    together = few(phases, most)
    assert len(together) <= most
    assert sum(phase.steps for phase in together) == sum(phase.steps for phase in phases)
    assert epsilon_bound(together, 1e-5).epsilon >= epsilon_bound(phases, 1e-5).epsilon


def _plan_of(sigma: float) -> PrivacyPlan:
    return PrivacyPlan(
        noise_multiplier=sigma, clip_norm=1.0, delta=1e-5, dataset_size=1000, expected_batch_size=100, steps=3100
    )
