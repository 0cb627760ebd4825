"""The statement: exact fields, strict JSON, and a line that never understates ε."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_dp.accounting import Ledger, Statement, epsilon_bound
from lightning_dp.accounting.calibrate import noise_multiplier_for
from lightning_dp.accounting.risk import risk_of, round_up
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.version import __version__
from tests.nearly import assert_nearly

FIELDS = [
    "epsilon",
    "delta",
    "target_epsilon",
    "accountant",
    "neighbouring_relation",
    "sampling",
    "sampling_probability",
    "dataset_size",
    "expected_batch_size",
    "noise_multiplier",
    "noise",
    "clip_norm",
    "max_batch_size",
    "clipping",
    "automatic_gamma",
    "adaptation",
    "gradient_filter",
    "steps",
    "randomness",
    "simulation",
    "risk",
    "unit",
    "version",
    "caveats",
]


def make_ledger(steps: int, state: dict[str, Any] | None = None, **changes: Any) -> Ledger:
    numbers: dict[str, Any] = {
        "noise_multiplier": 3.0,
        "clip_norm": 1.0,
        "delta": 1e-5,
        "dataset_size": 50000,
        "expected_batch_size": 4096,
        "steps": 875,
    }
    plan = PrivacyPlan(**{**numbers, **changes})
    ledger = Ledger(plan) if state is None else Ledger.resume(plan, state)
    for _ in range(steps):
        ledger.charge()
    return ledger


def strict(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_the_quotable_line() -> None:
    statement = Statement.of(make_ledger(875), randomness="secret")
    assert str(statement) == (
        "(ε = 3.61, δ = 1e-05)-DP, add/remove one example with N public, Poisson sampling with q = 0.08192, σ = 3.0, "
        "C = 1.0, 875 steps, PRV accountant (upper bound)"
    )
    assert statement.caveats == []


@pytest.mark.parametrize("page", ["README.md", "docs/for_your_privacy_officer.md"])
def test_pages_show_what_the_digits_recipe_says_today(page: str) -> None:
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    (shown,) = re.findall(r"^.*(\(ε = 8\.00, δ = 1e-05\)-DP, add.*)$", text, re.MULTILINE)
    (risk,) = re.findall(r"^.*(Whoever sees everything released.*of the time)$", text, re.MULTILINE)
    sigma = noise_multiplier_for(8.0, 1e-5, 512 / 1437, 120)
    numbers = {"noise_multiplier": sigma, "dataset_size": 1437, "expected_batch_size": 512}
    statement = Statement.of(make_ledger(120, **numbers), randomness="secret")
    number = r"\d+\.?\d*(?:e-\d+)?"
    for told, said in ((shown, str(statement)), (risk, statement.in_words or "")):
        assert re.sub(number, "", told) == re.sub(number, "", said)
        told_numbers, said_numbers = ([float(one) for one in re.findall(number, line)] for line in (told, said))
        assert told_numbers == pytest.approx(said_numbers, rel=1e-3)


def test_fields() -> None:
    ledger = make_ledger(875, target_epsilon=4.0)
    written = strict(Statement.of(ledger, randomness="secret", caveats=["one", "one"]).to_json())
    assert list(written) == FIELDS
    expected = {
        "epsilon": epsilon_bound(ledger.phases, 1e-5).epsilon,
        "delta": 1e-5,
        "target_epsilon": 4.0,
        "accountant": "PRV",
        "neighbouring_relation": "add/remove one example with N public",
        "sampling": "Poisson",
        "sampling_probability": 4096 / 50000,
        "dataset_size": 50000,
        "expected_batch_size": 4096,
        "noise_multiplier": 3.0,
        "noise": "Gaussian noise in floating point",
        "clip_norm": 1.0,
        "max_batch_size": None,
        "clipping": "flat",
        "automatic_gamma": None,
        "adaptation": None,
        "gradient_filter": None,
        "steps": 875,
        "randomness": "secret",
        "simulation": None,
        "risk": risk_of(ledger.phases).to_dict(),
        "unit": "example",
        "version": __version__,
        "caveats": ["one"],
    }
    assert_nearly(written, expected)


def test_the_clipping_style_is_said() -> None:
    statement = Statement.of(make_ledger(3, clipping="automatic", automatic_gamma=0.5), randomness="secret")
    assert "C = 1.0 (automatic clipping), 3 steps" in str(statement)
    assert (statement.clipping, statement.automatic_gamma) == ("automatic", 0.5)
    followed = Statement.of(make_ledger(3, clipping="quantile", clip_quantile=0.8), randomness="secret")
    assert "C = 1.0 at first (quantile clipping), 3 steps" in str(followed)
    assert followed.adaptation == {"clip_quantile": 0.8, "clip_learning_rate": 0.2, "quantile_weight": 0.2}
    assert any(caveat.startswith("the clip norm is adapted") for caveat in followed.caveats)
    assert followed.epsilon == statement.epsilon
    on_a_grid = make_ledger(3, clipping="slaclip", resolution=2**20, coordinates=9)
    assert Statement.of(on_a_grid, randomness="secret").noise == (
        "discrete Gaussian noise (sensitivity = 1048576 units of a grid)"
    )
    layers = Statement.of(make_ledger(3, clipping="per_layer", automatic_gamma=0.5), randomness="secret")
    assert "C = 1.0 (per layer clipping), 3 steps" in str(layers)
    assert layers.automatic_gamma is None
    assert_nearly([layers.epsilon, statement.epsilon], [Statement.of(make_ledger(3), randomness="secret").epsilon] * 2)


def test_a_known_seed_is_said() -> None:
    statement = Statement.of(make_ledger(1), randomness="reproducible")
    assert statement.randomness == "reproducible"
    assert any("seed" in caveat and "does not hold" in caveat for caveat in statement.caveats)
    assert "known seed" in str(statement)
    with pytest.raises(ValueError, match="randomness='maybe'"):
        Statement.of(make_ledger(1), randomness="maybe")


def test_infinite_values_are_strict_json() -> None:
    ledger = make_ledger(1, noise_multiplier=0.0, clip_norm=math.inf)
    statement = Statement.of(ledger, randomness="secret")
    assert statement.epsilon == math.inf
    written = strict(statement.to_json())
    assert written["epsilon"] == "inf"
    assert written["clip_norm"] == "inf"
    assert float(written["epsilon"]) == math.inf
    assert "ε = ∞" in str(statement)
    assert any("without noise" in caveat for caveat in statement.caveats)


def test_a_composed_history_is_said() -> None:
    first = make_ledger(10)
    second = make_ledger(5, first.state_dict(), noise_multiplier=4.0, clip_norm=2.0)
    statement = Statement.of(second, randomness="secret")
    assert (
        "Poisson sampling, composed of 2 phases: 10 steps with q = 0.08192, σ = 3.0; "
        "5 steps with q = 0.08192, σ = 4.0, C = 2.0, 15 steps" in str(statement)
    )
    assert set(second.notes) <= set(statement.caveats)
    assert len(second.notes) == 2
    untouched = Statement.of(make_ledger(0, first.state_dict(), noise_multiplier=4.0), randomness="secret")
    assert "composed of 1 phase: 10 steps with q = 0.08192, σ = 3.0" in str(untouched)


def test_a_fallback_is_said() -> None:
    ledger = make_ledger(875, noise_multiplier=0.1, expected_batch_size=40000)
    statement = Statement.of(ledger, randomness="secret")
    assert statement.accountant == "RDP"
    assert ledger.epsilon().note in statement.caveats
    assert str(statement).endswith("RDP accountant (upper bound)")


def test_before_the_first_step() -> None:
    statement = Statement.of(make_ledger(0), randomness="secret")
    assert "(ε = 0, " in str(statement)
    assert "0 steps" in str(statement)


def test_a_statement_cannot_be_changed() -> None:
    statement = Statement.of(make_ledger(0), randomness="secret")
    with pytest.raises(dataclasses.FrozenInstanceError):
        statement.epsilon = 0.1


@given(st.floats(1e-9, 1e9))
def test_rounding_never_understates(value: float) -> None:
    printed = float(round_up(value))
    assert value <= printed <= value * 1.01 + 1e-300
    assert round_up(printed) == round_up(value) or printed == pytest.approx(float(round_up(printed)), rel=0.011)


@pytest.mark.parametrize(
    ("value", "printed"),
    [(3.6118, "3.62"), (8.0, "8.00"), (7.991, "8.00"), (9.991, "10.00"), (0.0, "0"), (0.01234, "0.0124")],
)
def test_rounding_examples(value: float, printed: str) -> None:
    assert round_up(value) == printed
