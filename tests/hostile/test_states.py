"""Ledgers, checkpoints and journals with any field changed: refused, or the same ε; never another one in silence."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_dp import PreflightError
from lightning_dp.accounting import Ledger
from lightning_dp.accounting.entry import FIELDS, Entry
from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.record.checkpoint import Spent, read_with_digest, spent_of, with_digest
from lightning_dp.record.journal import Journal, JournalError
from lightning_dp.record.journal_line import FILE_NAME
from lightning_dp.record.lineage import Lineage
from lightning_dp.record.lost_steps import Places, count_lost
from tests.hostile.values import STATES_TRIED, TRIED, as_many_as_promised, plain

KEY = "DifferentialPrivacy"


def plan(sigma: float = 2.0) -> PrivacyPlan:
    return PrivacyPlan(noise_multiplier=sigma, clip_norm=1.0, delta=1e-5, dataset_size=1000, expected_batch_size=100)


def two_phases() -> dict[str, Any]:
    first = Ledger(plan())
    for _ in range(3):
        first.charge()
    second = Ledger.resume(plan(3.0), first.state_dict())
    second.charge()
    return second.state_dict()


STATE = two_phases()
SPENT = Spent(STATE, Lineage("training", "/nowhere/privacy.journal", {"fit": 4}), 1)
LINEAGE = [field.name for field in fields(Lineage)]


@settings(max_examples=2500)
@given(phase=st.integers(0, 1), field=st.sampled_from(FIELDS), value=plain)
def test_a_field_of_the_ledger_is_read_as_it_is_or_refused(phase: int, field: str, value: Any) -> None:
    """What is read is what is composed: a value that passes is in the phases, and nothing else has moved."""
    TRIED["ledger fields"] += 1
    state = copy.deepcopy(STATE)
    state["phases"][phase][field] = value
    try:
        entries = tuple(map(Entry.read, state["phases"]))
    except ValueError as error:
        assert field in str(error) or "expected" in str(error)  # noqa: PT017 (either outcome is right)
        return
    before = tuple(map(Entry.read, STATE["phases"]))
    assert entries[1 - phase] == before[1 - phase]
    read = entries[phase].numbers
    assert read[field] == (pytest.approx(value, rel=1e-8) if field == "sampling_probability" else value)
    assert read["sampling_probability"] == read["expected_batch_size"] / read["dataset_size"]


def shaken(data: st.DataObject, node: Any) -> Any:
    """``node`` with one place in it replaced, removed, doubled or swapped."""
    node = copy.deepcopy(node)
    places: list[tuple[Any, Any]] = []

    def walk(inner: Any) -> None:
        for key in inner if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ():
            places.append((inner, key))
            walk(inner[key])

    walk(node)
    holder, key = data.draw(st.sampled_from(places))
    act = data.draw(st.sampled_from(["replace", "remove", "add", "reorder"]))
    if act == "replace":
        holder[key] = data.draw(plain)
    elif act == "remove":
        del holder[key]
    elif act == "add" and isinstance(holder, dict):
        holder["more"] = data.draw(plain)
    elif isinstance(holder, list):
        holder.reverse() if act == "reorder" else holder.append(holder[0])
    return node


def canonical(state: Any) -> str:
    return json.dumps(state, sort_keys=True)


@settings(max_examples=2000, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_state_changed_anywhere_is_refused(data: st.DataObject) -> None:
    TRIED["states with a digest"] += 1
    state = with_digest(SPENT)
    changed = shaken(data, state)
    if canonical(changed) == canonical(state):
        assert read_with_digest(changed) == SPENT
        return
    with pytest.raises(PreflightError, match=r"expected|whole and unedited"):
        read_with_digest(changed)


@settings(max_examples=500)
@given(value=plain, place=st.sampled_from(["callbacks", "state", "global_step"]))
def test_a_checkpoint_of_anything_is_refused(value: Any, place: str) -> None:
    TRIED["checkpoints"] += 1
    right = {"callbacks": {KEY: with_digest(SPENT)}, "global_step": 4}
    assert spent_of(right, KEY) == SPENT
    wrong = {**right, "callbacks": {KEY: value}} if place == "state" else {**right, place: value}
    if place == "global_step" and type(value) is int and 0 <= value <= 4:
        assert spent_of(wrong, KEY) == SPENT
        return
    with pytest.raises(PreflightError, match="expected"):
        spent_of(wrong, KEY)


@pytest.fixture(scope="module")
def journal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Lineage]:
    folder = tmp_path_factory.mktemp("journal")
    one = Journal(folder, Ledger(plan()).numbers)
    one.record(2)
    checkpoint = one.lineage
    one.record(5)
    one.close(ended=True)
    return folder / FILE_NAME, checkpoint


@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_journal_changed_anywhere_is_refused_or_counts_all_or_says_that_it_may_not(
    journal: tuple[Path, Lineage], data: st.DataObject
) -> None:
    TRIED["journals"] += 1
    file, lineage = journal
    whole = file.read_text()
    try:
        file.write_text(json.dumps(shaken(data, json.loads(whole))) + "\n")
        phases, after = count_lost(lineage, Places([file.parent]))
        for phase in phases:
            Entry.read(phase)
        counted = sum(phase["steps"] for phase in phases)
        counted += sum(after.beside.values())
        assert counted >= 3 or not (after.found and after.proved)
    except JournalError as error:
        assert "privacy.journal, line 1" in str(error)  # noqa: PT017 (either outcome is right)
    finally:
        file.write_text(whole)


@settings(max_examples=700)
@given(raw=st.one_of(plain, st.dictionaries(st.sampled_from(LINEAGE), plain)))
def test_a_lineage_of_anything_is_refused(raw: Any) -> None:
    TRIED["lineages"] += 1
    try:
        read = Lineage.read(raw)
    except ValueError as error:
        assert "Resume from a whole one" in str(error)  # noqa: PT017 (either outcome is right)
    else:
        assert set(raw) in (set(LINEAGE), set(LINEAGE[:5]))
        assert read.lost == raw["lost"]


def test_as_many_inputs_were_tried_as_promised() -> None:
    assert as_many_as_promised(STATES_TRIED) == {}
