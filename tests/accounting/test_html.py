"""Tables for notebooks: well-formed, escaped, without a colour of their own, and with all that must be said beside ε."""

from __future__ import annotations

import dataclasses
import re
from xml.etree import ElementTree

import pytest
from torch import nn

from lightning_dp.accounting import Ledger, Statement
from lightning_dp.accounting.risk import round_up
from lightning_dp.engines.select import Selection, make_engine
from lightning_dp.plan.html import html_table
from lightning_dp.plan.privacy_plan import PrivacyPlan


def plan(**changes: object) -> PrivacyPlan:
    numbers = {
        "noise_multiplier": 2.0,
        "clip_norm": 0.5,
        "delta": 1e-5,
        "dataset_size": 1000,
        "expected_batch_size": 100,
    }
    return PrivacyPlan(**{**numbers, **changes})


def rows(html: str) -> dict[str, str]:
    """Name → value, read by a parser that takes no HTML but what is well-formed."""
    return {line[0].text or "": line[1].text or "" for line in ElementTree.fromstring(html).iter("tr")}


def test_what_is_not_ours_is_escaped() -> None:
    html = html_table("<script>a</script>", {"<i>": "<img src=x onerror=alert(1)>"}, ["a & <b>"])
    assert not re.search("<script|<img|<i>|<b>", html)
    assert rows(html) == {"<i>": "<img src=x onerror=alert(1)>"}
    named = dataclasses.replace(Statement.of(Ledger(plan()), randomness="secret"), unit="<b>", caveats=["<u>x</u>"])
    assert "<u>" not in named._repr_html_()


@pytest.mark.parametrize("target", [None, 8.0])
def test_a_statement_shows_its_sentence_its_numbers_and_every_caveat(target: float | None) -> None:
    ledger = Ledger(plan(target_epsilon=target))
    ledger.charge()
    statement = Statement.of(ledger, randomness="reproducible", caveats=["one caveat"])
    html = statement._repr_html_()
    shown, tree = rows(html), ElementTree.fromstring(html)
    assert tree.findtext("p/strong") == str(statement)
    assert [line.text for line in tree.iter("li")] == statement.caveats
    assert len(statement.caveats) > 1
    assert shown["ε spent, an upper bound"] == round_up(statement.epsilon)
    assert (shown["δ"], shown["clip norm C"], shown["sampling probability q"]) == ("1e-05", "0.5", "0.1")
    assert shown["risk"] == statement.in_words
    assert shown.get("budget ε") == (None if target is None else "8")


def test_a_simulation_and_several_phases_are_said_first_and_beside_the_numbers() -> None:
    simulated = Ledger(plan(simulation=4))
    simulated.charge()
    assert "<p><strong>SIMULATION, NOT PRIVATE" in Statement.of(simulated, randomness="secret")._repr_html_()
    assert "SIMULATION" in plan(simulation=4)._repr_html_()
    resumed = Ledger.resume(plan(noise_multiplier=3.0), simulated.state_dict())
    resumed.charge()
    assert rows(Statement.of(resumed, randomness="secret")._repr_html_())["noise multiplier σ in the last phase"] == "3"


def test_a_plan_shows_what_is_set_and_what_follows() -> None:
    shown = rows(plan(steps=50)._repr_html_())
    assert (shown["noise_multiplier"], shown["steps"], shown["sampling probability q"]) == ("2", "50", "0.1")
    assert shown["noise on the sum, σ·S"] == "1"
    assert "simulation" not in shown
    assert "target_epsilon" not in shown
    assert "∞" in plan(noise_multiplier=0.0, clip_norm=float("inf"))._repr_html_()


def test_the_selection_says_engine_reason_and_rules() -> None:
    module = nn.Linear(2, 2)
    shown = Selection(make_engine("loop", module), "vmap cannot <trace> it", ("body",))._repr_html_()
    assert "<strong>Engine &#x27;loop&#x27;</strong>" in shown
    assert rows(shown)["reason"] == "vmap cannot <trace> it"
    assert rows(shown)["without torch.compile"] == "body"
    assert "yes" in rows(shown)["runs one example at a time"]


def test_the_page_gives_the_colours() -> None:
    """Only ``inherit`` and ``transparent``: text is readable on a light page and on a dark one."""
    html = plan()._repr_html_()
    assert set(re.findall(r"(?:color|background):([^;\"]+)", html)) == {"inherit", "transparent"}
