"""Arbitrary values as arguments: a ValueError that names one of them, or an object whose numbers are in range."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonargparse import ArgumentParser

from lightning_dp import AugmentationMultiplicity, DifferentialPrivacy, ExponentialMovingAverage, StepProgressBar
from lightning_dp.accounting import Phase, epsilon_bound, noise_multiplier_for
from lightning_dp.cli.main import main
from lightning_dp.plan.clipping import ClippingStyle
from lightning_dp.plan.privacy_plan import PrivacyPlan
from tests.hostile.values import ARGUMENTS_TRIED, TRIED, Unprintable, anything, as_many_as_promised

ARGUMENTS = {
    "epsilon": 8.0, "noise_multiplier": None, "delta": 1e-5, "clip_norm": 1.0, "expected_batch_size": None,
    "dataset_size": None, "physical_batch_size": None, "max_batch_size": None, "engine": "auto", "seed": None,
    "log_train_metrics": True, "clipping": "flat", "automatic_gamma": 0.01, "simulate": 1, "secure": False,
    "public_optimizers": None, "static_shapes": False, "batch_axis": 0, "privacy_unit": None, "max_examples_per_unit": None,
    "clip_quantile": None, "clip_learning_rate": None, "quantile_weight": None, "slack_bins": None,
    "sampling": "poisson", "noise": "independent", "noise_bands": 4, "noise_momentum": None,
    "gradient_filter": None, "filter_gain": 0.7, "filter_lookahead": 0.5,
    "advantage": None, "tpr_at_fpr": None, "mu": None, "autotune": None,
}  # fmt: skip
PLAN = {
    "noise_multiplier": 1.0, "clip_norm": 1.0, "delta": 1e-5, "dataset_size": 1000, "expected_batch_size": 10.0, "steps": 5,
    "target_epsilon": 8.0,
}  # fmt: skip


def refused_or_right(make: Callable[[], Any], names: set[str], right: Callable[[Any], bool], label: str) -> None:
    TRIED[label] += 1
    told = ""
    try:
        made = make()
    except ValueError as error:
        told = str(error)
    if not told:
        assert right(made), repr(made)
        return
    assert any(f"{name}=" in told for name in names), told
    assert "expected" in told.lower() or "without clipping" in told, told
    assert len(told) < 1000


def sound(private: DifferentialPrivacy) -> bool:
    """The numbers can be put into the theorem."""
    budgets = (private.epsilon, private.noise_multiplier, private.advantage, private.tpr_at_fpr, private.mu)
    one = sum(budget is not None for budget in budgets) == 1
    positive = private.epsilon is None or 0 < float(private.epsilon) < math.inf
    noise = private.noise_multiplier is None or 0 <= float(private.noise_multiplier) < math.inf
    counts = (private.expected_batch_size, private.dataset_size, private.max_batch_size)
    whole = all(count is None or (int(count) == count and count >= 1) for count in counts)
    plain_bool = all(type(v) is bool for v in (private.log_train_metrics, private.secure, private.static_shapes))
    plain_bool &= private.autotune is None or type(private.autotune) is bool
    whole &= private.simulate >= 1 and all(place >= 0 for place in private.public_optimizers)
    whole &= 0 < float(private.automatic_gamma) < math.inf and private.clipping in get_args(ClippingStyle)
    whole &= not private.secure or (private.seed is None and private.noise_multiplier != 0)
    return (
        one and positive and noise and 0 < float(private.delta) < 1 and private.clip_norm > 0 and whole and plain_bool
    )


changes = st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), anything, min_size=1, max_size=3)


@settings(max_examples=4000)
@given(changes=changes)
def test_the_callback_takes_anything_and_refuses_what_makes_no_sense(changes: dict[str, Any]) -> None:
    refused_or_right(lambda: DifferentialPrivacy(**{**ARGUMENTS, **changes}), set(ARGUMENTS), sound, "callback")


@settings(max_examples=1500)
@given(changes=st.dictionaries(st.sampled_from(sorted(PLAN)), anything, min_size=1, max_size=3))
def test_a_plan_holds_numbers_that_make_sense(changes: dict[str, Any]) -> None:
    names = {*PLAN, "epsilon"}
    refused_or_right(
        lambda: PrivacyPlan(**{**PLAN, **changes}), names, lambda plan: 0 < plan.sampling_probability <= 1, "plan"
    )


NEWEST = ("simulate", "batch_axis", "static_shapes", "public_optimizers", "secure", "privacy_unit", "clipping",
          "automatic_gamma", "max_examples_per_unit", "clip_quantile", "slack_bins", "sampling", "noise", "noise_bands",
          "noise_momentum", "gradient_filter", "filter_gain", "filter_lookahead", "autotune")  # fmt: skip


@settings(max_examples=500)
@given(name=st.sampled_from(NEWEST), value=anything)
def test_a_refusal_names_the_argument_that_is_wrong(name: str, value: Any) -> None:
    """One argument out of order, all others right."""
    TRIED["one argument"] += 1
    given_with = {**ARGUMENTS, **({"privacy_unit": "user_id"} if name == "max_examples_per_unit" else {}), name: value}
    told = ""
    try:
        made = DifferentialPrivacy(**given_with)
    except ValueError as error:
        told = str(error)
    assert told.startswith(f"{name}=") if told else sound(made), told


@settings(max_examples=300)
@given(value=anything)
def test_the_other_callbacks_too(value: Any) -> None:
    refused_or_right(
        lambda: ExponentialMovingAverage(decay=value), {"decay"}, lambda made: 0 <= made.decay < 1, "others"
    )
    refused_or_right(
        lambda: ExponentialMovingAverage(validate_raw=value), {"validate_raw"}, lambda _: type(value) is bool, "others"
    )
    refused_or_right(lambda: AugmentationMultiplicity(k=value), {"k"}, lambda made: made.k >= 0, "others")
    refused_or_right(
        lambda: StepProgressBar(refresh_rate=value), {"refresh_rate"}, lambda made: made.refresh_rate >= 0, "others"
    )


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    """What LightningCLI makes of the callback's signature."""
    made = ArgumentParser(exit_on_error=False)
    made.add_class_arguments(DifferentialPrivacy, "privacy")
    return made


words: st.SearchStrategy[str] = st.one_of(
    st.sampled_from(
        [
            "8",
            "1e-5",
            "nan",
            ".inf",
            "-1",
            "0",
            "true",
            "null",
            "[1]",
            "{a: 1}",
            "1e400",
            "8.0.0",
            "٨",
            "0x10",
            "1_0",
            "!!python/none",
        ]
    ),
    st.floats().map(str),
    st.integers().map(str),
    st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=10),
)


@settings(max_examples=1000)
@given(given_words=st.dictionaries(st.sampled_from(sorted(ARGUMENTS)), words, min_size=1, max_size=3))
def test_a_recipe_is_refused_by_name_or_becomes_a_sound_callback(
    parser: ArgumentParser, given_words: dict[str, str]
) -> None:
    TRIED["recipe"] += 1
    base = {} if {"epsilon", "noise_multiplier"} & set(given_words) else {"epsilon": "8"}
    words = [f"--privacy.{name}={word}" for name, word in {**base, **given_words}.items()]
    told, own = "", True
    try:
        made = parser.instantiate_classes(parser.parse_args(words)).privacy
    except Exception as error:  # ours, or jsonargparse's own refusal, which names the key
        own, told = type(error) is ValueError, f"{type(error).__module__}: {error}"
    if not told:
        assert sound(made)
    elif own:
        assert any(f"{name}=" in told for name in ARGUMENTS), told
    else:
        assert told.startswith(("jsonargparse", "argparse")), told
        assert "privacy" in told, told


# --- the command line -------------------------------------------------------------------------------------------------

NUMBERS = {"--noise-multiplier": "1.0", "--sampling-probability": "0.1", "--steps": "10", "--delta": "1e-5"}
TARGETS = {"--epsilon": "8", "--sampling-probability": "0.1", "--steps": "10", "--delta": "1e-5"}


def bad(word: str) -> bool:
    """Whether no option means anything by it. (What is right takes time to compute; tests/cli has that.)"""
    try:
        return not 0 < float(word) < math.inf
    except ValueError:
        return True


def said(*line: str) -> tuple[int, str]:
    told, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(failed):
        try:
            main(line)
        except SystemExit as end:
            return int(end.code or 0), failed.getvalue()
    return 0, told.getvalue()


@settings(max_examples=450)
@given(command=st.sampled_from(["epsilon", "calibrate"]), data=st.data())
def test_the_calculators_refuse_by_name(command: str, data: st.DataObject) -> None:
    TRIED["command line"] += 1
    right = NUMBERS if command == "epsilon" else TARGETS
    wrong = data.draw(st.dictionaries(st.sampled_from(sorted(right)), words.filter(bad), min_size=1, max_size=2))
    code, text = said(command, *(f"{name}={word}" for name, word in {**right, **wrong}.items()))
    if code == 0:  # σ = 0 and no steps at all are right
        assert set(wrong) <= {"--noise-multiplier", "--steps"}
        assert "≤" in text
    else:
        assert code == 2
        assert any(name in text or name.strip("-").replace("-", "_") + "=" in text for name in wrong), text


CANARIES = {"--gradient-canaries": "20", "--input-canaries": "20", "--confidence": "0.95", "--seed": "1"}


@settings(max_examples=250)
@given(wrong=st.dictionaries(st.sampled_from(sorted(CANARIES)), words.filter(bad), min_size=1, max_size=4))
def test_an_audit_refuses_by_name_before_it_reads_the_recipe(wrong: dict[str, str]) -> None:
    TRIED["audit"] += 1
    given_words = [f"{name}={word}" for name, word in {**CANARIES, **wrong}.items()]
    code, text = said("audit", "--config", "no/such/recipe.yaml", *given_words)
    if "no/such/recipe.yaml" in text:  # no canary of one kind, and the first of all seeds, are right
        assert all(float(word) == 0 for word in wrong.values())
        return
    assert code == 2
    assert any(name in text or name.strip("-").replace("-", "_") + "=" in text for name in wrong), text


@settings(max_examples=15)
@given(
    sigma=st.sampled_from([1e-9, 1e-3, 0.3, 1.0, 30.0, 1e5, 1e9]),
    q=st.sampled_from([1e-15, 1e-9, 1e-4, 0.3, 1.0 - 1e-16, 1.0]),
    steps=st.sampled_from([0, 1, 2, 1000]),
    delta=st.sampled_from([1e-300, 1e-18, 1e-5, 0.5, 1.0 - 1e-16]),
)
def test_epsilon_is_a_bound_at_the_ends_of_the_ranges(sigma: float, q: float, steps: int, delta: float) -> None:
    """Never NaN, never negative, never a warning, and growing with the steps."""
    TRIED["ends of the ranges"] += 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = epsilon_bound([Phase(sigma, q, steps)], delta).epsilon
        assert found >= 0
        assert found <= epsilon_bound([Phase(sigma, q, 2 * steps)], delta).epsilon * (1 + 1e-9) + 0.02


@settings(max_examples=250)
@given(numbers=st.lists(anything, min_size=4, max_size=4), place=st.integers(0, 3))
def test_the_accountant_refuses_by_name(numbers: list[Any], place: int) -> None:
    arguments: list[Any] = [8.0, 1e-5, 0.1, 10]
    arguments[place] = numbers[place]
    names = ("epsilon", "delta", "sampling_probability", "steps")
    TRIED["accountant"] += 1
    if isinstance(numbers[place], Real) and not isinstance(numbers[place], bool):
        return  # a number may be right, and then takes a search
    with pytest.raises(ValueError, match=f"{names[place]}="):
        noise_multiplier_for(*arguments)


@pytest.mark.parametrize("batch", [5e-324, 1e-310])
def test_a_batch_so_small_that_its_probability_is_zero_is_refused(batch: float) -> None:
    with pytest.raises(
        ValueError, match=r"expected_batch_size=.* gives a sampling probability of .*: expected a value"
    ):
        PrivacyPlan(**{**PLAN, "expected_batch_size": batch})


def test_a_message_is_made_of_anything() -> None:
    with pytest.raises(ValueError, match=r"seed=<Unprintable>: expected a whole number"):
        DifferentialPrivacy(epsilon=8.0, seed=Unprintable())
    with pytest.raises(ValueError, match=r"seed='x.*\.\.\.: expected"):
        DifferentialPrivacy(epsilon=8.0, seed="x" * 10_000)


def test_as_many_inputs_were_tried_as_promised() -> None:
    assert as_many_as_promised(ARGUMENTS_TRIED) == {}
