"""The ledger's line holds the whole mechanism: what changes is a phase of its own, and is said."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_dp.accounting import Ledger, Statement
from lightning_dp.accounting.entry import FIELDS, Entry
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import PrivacyPlan

NUMBERS: dict[str, Any] = {
    "noise_multiplier": 2.0,
    "clip_norm": 1.0,
    "delta": 1e-5,
    "dataset_size": 1000,
    "expected_batch_size": 100,
    "steps": 50,
    "clipping": "automatic",
    "automatic_gamma": 0.25,
    "max_batch_size": 300,
    "resolution": 2**20,
    "coordinates": 9,
    "unit": "user",
}
ADAPTED: dict[str, Any] = {"clip_quantile": 0.7, "clip_learning_rate": 0.1, "quantile_weight": 0.3}  # fmt: skip
FILTERED: dict[str, Any] = {"gradient_filter": "disk", "filter_gain": 0.6, "filter_lookahead": 0.8}
OTHERS: dict[str, Any] = {
    "noise_multiplier": 3.0, "clip_norm": 0.5, "dataset_size": 2000, "expected_batch_size": 50, "clipping": "flat",
    "automatic_gamma": 0.5, "max_batch_size": 400, "resolution": 2**21, "coordinates": 10, "unit": "patient",
    "sampling": "random_allocation",
}  # fmt: skip


def charged(plan: PrivacyPlan, steps: int, before: dict[str, Any] | None = None) -> Ledger:
    ledger = Ledger(plan) if before is None else Ledger.resume(plan, before)
    for _ in range(steps):
        ledger.charge()
    return ledger


def notes_on_gamma(ledger: Ledger) -> list[str]:
    return [note for note in Statement.of(ledger, randomness="secret").caveats if "γ" in note]


def old_state(**numbers: Any) -> dict[str, Any]:
    """As written before the ledger kept γ."""
    state: dict[str, Any] = charged(PrivacyPlan(**{**NUMBERS, **numbers}), 3).state_dict()
    state["phases"] = [{n: v for n, v in phase.items() if n != "automatic_gamma"} for phase in state["phases"]]
    return state


def test_no_number_of_the_mechanism_falls_off() -> None:
    plan = PrivacyPlan(**NUMBERS)
    adapted, slack = plan.but(clipping="quantile"), plan.but(clipping="slaclip")
    of_sampling = {"noise"}  # of which others do not go with these
    alone = {"slack_bins", "participations", "adjacency"}
    assert {*OTHERS, *ADAPTED, *FILTERED, *alone} == set(plan.mechanism.numbers) - of_sampling
    for name, value in OTHERS.items():
        assert Entry.of(plan.but(**{name: value}), 1) != Entry.of(plan, 1), name
    for name, value in ADAPTED.items():
        assert Entry.of(adapted.but(**{name: value}), 1) != Entry.of(adapted, 1), name
        assert Entry.of(adapted.but(**{name: value}), 1).text() != Entry.of(adapted, 1).text(), name
    assert Entry.of(slack.but(slack_bins=3), 1) != Entry.of(slack, 1)
    filtered = plan.but(**FILTERED)
    for name, value in FILTERED.items():
        other = filtered.but(**{name: value / 2}) if name != "gradient_filter" else plan
        assert Entry.of(other, 1) != Entry.of(filtered, 1), name
        assert Entry.of(other, 1).text() != Entry.of(filtered, 1).text(), name
    uncut = plan.but(max_batch_size=None)
    assert Entry.of(uncut.but(adjacency="zero_out"), 1) != Entry.of(uncut, 1)
    assert "adjacency='zero_out'" in Entry.of(uncut.but(adjacency="zero_out"), 1).text()
    blocks = plan.but(sampling="random_allocation", participations=3)
    assert Entry.of(blocks.but(participations=1), 1) != Entry.of(blocks, 1)
    assert Entry.of(blocks.but(participations=1), 1).text() != Entry.of(blocks, 1).text()
    for each in (plan, adapted.but(**ADAPTED), slack.but(slack_bins=3), filtered):
        entry = Entry.of(each, 7)
        assert set(entry.numbers) == set(FIELDS)
        assert Entry.read(json.loads(json.dumps(entry.numbers))) == entry


def test_the_key_of_a_run_that_adapts_nothing_is_as_it_was() -> None:
    """The text enters the key of a run with a known seed."""
    assert not any(
        name in Entry.of(PrivacyPlan(**NUMBERS), 1).text()
        for name in (*ADAPTED, *FILTERED, "slack_bins", "participations", "adjacency", "sizes")
    )


def test_another_way_to_adapt_is_another_phase_and_is_said() -> None:
    plan = PrivacyPlan(**NUMBERS).but(clipping="quantile")
    ledger = charged(plan.but(clip_quantile=0.7), 3, charged(plan, 2).state_dict())
    assert [(p["steps"], p["clip_quantile"]) for p in ledger.state_dict()["phases"]] == [(2, 0.5), (3, 0.7)]
    assert any("how the clip norm is adapted changed" in note for note in ledger.notes)
    assert ledger.epsilon() == charged(plan, 5).epsilon()


def test_another_gamma_is_another_phase_and_is_said() -> None:
    plan = PrivacyPlan(**NUMBERS)
    first = charged(plan, 2)
    second = charged(plan.but(automatic_gamma=0.5), 3, first.state_dict())
    assert [(p["steps"], p["automatic_gamma"]) for p in second.state_dict()["phases"]] == [(2, 0.25), (3, 0.5)]
    assert notes_on_gamma(second) == [
        "γ of automatic clipping changed during training from 0.25 to 0.5; ε does not depend on it"
    ]
    assert second.epsilon() == charged(plan, 5).epsilon()
    third = charged(plan.but(automatic_gamma=0.5), 1, second.state_dict())
    assert [p["steps"] for p in third.state_dict()["phases"]] == [2, 4]


def test_a_gamma_without_meaning_makes_no_phase() -> None:
    plan = PrivacyPlan(**{**NUMBERS, "clipping": "flat"})
    ledger = charged(plan.but(automatic_gamma=0.5), 3, charged(plan, 2).state_dict())
    assert [(p["steps"], p["automatic_gamma"]) for p in ledger.state_dict()["phases"]] == [(5, None)]
    assert notes_on_gamma(ledger) == []
    back = charged(plan.but(clipping="automatic"), 1, ledger.state_dict())
    assert notes_on_gamma(back) == []  # the style is said to have changed


def test_a_gamma_that_was_not_written_down_stays_unknown() -> None:
    plan = PrivacyPlan(**NUMBERS)
    ledger = charged(plan, 2, old_state())
    state = json.loads(json.dumps(ledger.state_dict()))
    assert [(p["steps"], p["automatic_gamma"]) for p in state["phases"]] == [(3, None), (2, 0.25)]
    for one in (ledger, Ledger.resume(plan, state)):
        assert notes_on_gamma(one) == [
            "γ of automatic clipping was not written down for 3 steps, so that it may have changed; ε does not depend on it"
        ]
    assert ledger.changed == ""  # a continuation that is repeated has the noise that it had


def test_old_states_of_other_styles_go_on_as_they_were() -> None:
    ledger = charged(PrivacyPlan(**{**NUMBERS, "clipping": "per_layer"}), 2, old_state(clipping="per_layer"))
    assert [p["steps"] for p in ledger.state_dict()["phases"]] == [5]
    assert notes_on_gamma(ledger) == []


def test_numbers_enter_the_key_in_the_form_they_always_had() -> None:
    plan = PrivacyPlan(noise_multiplier=2, clip_norm=1, delta=1e-5, dataset_size=1000, expected_batch_size=100)
    ledger = charged(plan.but(clip_norm=0.5), 1, charged(plan, 2).state_dict())
    assert ledger.changed == (
        "2: Entry(steps=0, noise_multiplier=2.0, sampling_probability=0.1, clip_norm=0.5, expected_batch_size=100.0, "
        "dataset_size=1000, delta=1e-05, max_batch_size=None, resolution=None, coordinates=None, clipping='flat', "
        "unit='example')"
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"automatic_gamma": "0.25"}, "automatic_gamma='0.25' in the ledger's state: expected a plain number"),
        ({"automatic_gamma": 0.0}, "automatic_gamma=0.0: expected a finite number above 0"),
        ({"clipping": "flat"}, "automatic_gamma=0.25 with clipping='flat': expected None"),
        ({"sampling_probability": 0.2}, r"sampling_probability=0.2 with expected_batch_size=100.0 .*expected their ratio"),
        ({"resolution": 0}, "resolution=0: expected at least 1"),
        ({"participations": 2}, "participations=2 with sampling='poisson': expected sampling='random_allocation'"),
        ({"filter_gain": 0.5}, "gradient_filter=None, filter_gain=0.5, filter_lookahead=None: expected all of them"),
        ({**FILTERED, "gradient_filter": "kalman"}, "gradient_filter='kalman': expected 'disk', or None"),
        ({**FILTERED, "filter_gain": "0.5"}, "filter_gain='0.5' in the ledger's state: expected a plain number"),
    ],
)  # fmt: skip
def test_a_line_that_nobody_writes_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Entry.read({**Entry.of(PrivacyPlan(**NUMBERS), 1).numbers, **change})


def test_a_mechanism_is_its_numbers() -> None:
    step = PrivacyPlan(**NUMBERS).mechanism
    assert Mechanism.of(**step.numbers) == step
    assert (step.sensitivity, step.noise_std, step.divisor, tuple(step.event())) == (1.0, 2.0, 100, (2.0, 0.1))
    with pytest.raises(TypeError, match=r"mechanism and clip_norm: expected one of the two"):
        PrivacyPlan(step, delta=1e-5, clip_norm=1.0)
