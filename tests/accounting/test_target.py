"""A budget that is a risk: σ is the smallest that keeps it, and a run stops where it is spent."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from scipy.stats import norm

from lightning_dp.accounting import Ledger, Phase
from lightning_dp.accounting.calibrate import noise_for_risk
from lightning_dp.accounting.find_plan import Known, Wanted, find_plan
from lightning_dp.accounting.target import RiskTarget
from lightning_dp.cli.main import main
from lightning_dp.errors import PreflightError
from lightning_dp.plan.clipping import Clipping

TARGETS = [RiskTarget("advantage", 0.2), RiskTarget("tpr_at_fpr", 0.02, 0.01), RiskTarget("mu", 0.5)]
KNOWN = Known(length=1000, batch_size=100, remaining_steps=60)


def wanted(**changes: Any) -> Wanted:
    return Wanted(**{"delta": 1e-5, "clipping": Clipping(1.0), **changes})


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("history", [(), (Phase(6.0, 0.05, 40),)])
def test_the_smallest_noise_that_keeps_the_risk(target: RiskTarget, history: tuple[Phase, ...]) -> None:
    sigma = noise_for_risk(target, lambda s: Phase(s, 0.1, 60), history)
    assert target.value * 0.99 <= target.risk([*history, Phase(sigma, 0.1, 60)]) <= target.value
    assert not target.holds([*history, Phase(sigma * 0.997, 0.1, 60)])


def test_without_sampling_it_is_the_gaussian_mechanism() -> None:
    for target, mu in zip(TARGETS, (2 * norm.ppf(0.6), norm.ppf(0.02) - norm.ppf(0.01), 0.5), strict=True):
        assert target.as_mu == pytest.approx(mu, rel=1e-9)
        sigma = noise_for_risk(target, lambda s: Phase(s, 1.0, 4))
        assert sigma == pytest.approx(2.0 / mu, rel=2e-3)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_plan_stops_where_the_risk_is_spent(target: RiskTarget) -> None:
    plan = find_plan(wanted(risk=target), KNOWN)
    ledger = Ledger(plan)
    assert ledger.affordable_steps == 60
    assert target.holds(ledger.phases_after(60))
    assert not target.holds(ledger.phases_after(63))
    for _ in range(60):
        ledger.charge()
    assert not ledger.can_charge()
    # A resume keeps σ, and more steps than were planned are not taken; a smaller target stops earlier, or at once.
    longer = find_plan(wanted(risk=target), Known(length=1000, batch_size=100, remaining_steps=50), ledger.state_dict())
    assert longer.noise_multiplier == plan.noise_multiplier
    assert not Ledger.resume(longer, ledger.state_dict()).can_charge()
    smaller = RiskTarget(target.name, target.value * 0.7 if target.fpr is None else 0.015, target.fpr)
    half = Ledger(plan)
    for _ in range(10):
        half.charge()
    resumed = find_plan(wanted(risk=smaller), Known(length=1000, batch_size=100, remaining_steps=50), half.state_dict())
    stops = Ledger.resume(resumed, half.state_dict()).affordable_steps
    assert stops is not None
    assert 10 < stops < 60
    assert smaller.holds(half.phases_after(stops))
    assert not smaller.holds(half.phases_after(stops + 2))
    with pytest.raises(
        ValueError, match=rf"{target.name}=.* the 60 steps already taken risk more\. .*Raise {target.name}"
    ):
        find_plan(wanted(risk=smaller), KNOWN, ledger.state_dict())


def test_discrete_noise_and_cut_draws_are_part_of_the_risk() -> None:
    target = RiskTarget("tpr_at_fpr", 0.02, 0.01)
    plain = find_plan(wanted(risk=target), KNOWN).noise_multiplier
    assert find_plan(wanted(risk=target, max_batch_size=110), KNOWN).noise_multiplier > plain
    fine = find_plan(wanted(risk=target, resolution=2**30, coordinates=100), KNOWN)
    ledger = Ledger(fine)
    assert target.holds(ledger.phases_after(60), ledger.slack(60).total_variation)
    assert fine.noise_multiplier == pytest.approx(plain, rel=1e-3)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"advantage=0.1, mu=0.5: expected at most one of them"):
        RiskTarget.of(advantage=0.1, mu=0.5)
    for name, value in (("advantage", 1.0), ("advantage", 0.0), ("mu", -1.0), ("mu", math.nan)):
        with pytest.raises(ValueError, match=rf"{name}="):
            RiskTarget.of(**{name: value})
    for rates in ([0.01, 0.02], [0.5], [0.5, 0.0], 0.5, [1.0, 0.1]):
        with pytest.raises(ValueError, match=r"tpr_at_fpr="):
            RiskTarget.of(tpr_at_fpr=rates)
    assert RiskTarget.of() is None
    with pytest.raises(PreflightError, match=r"mu=0.5 without an end"):
        find_plan(wanted(risk=TARGETS[2]), Known(length=1000, batch_size=100, remaining_steps=None))
    with pytest.raises(
        ValueError, match=r"advantage=1e-06 with delta=0.001: ε of the planned steps is 0 .*Lower delta"
    ):
        find_plan(wanted(risk=RiskTarget("advantage", 1e-6), delta=1e-3), KNOWN)
    with pytest.raises(ValueError, match=r"mu=0.01: the 1000 steps already taken have spent mu = .* Raise mu"):
        noise_for_risk(RiskTarget("mu", 0.01), lambda s: Phase(s, 0.1, 60), [Phase(1.0, 0.1, 1000)])


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["--advantage", "0.2"], lambda risk: 0.198 < risk["advantage"] <= 0.2),
        (["--tpr-at-fpr", "0.02", "0.01"], lambda risk: 0.0198 < risk["tpr_at_fpr"]["0.01"] <= 0.02),
        (["--mu", "0.5"], lambda risk: 0.495 < risk["mu"] <= 0.5),
    ],
)
def test_calibrate_by_risk_on_the_command_line(
    words: list[str], holds: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = ["--sampling-probability", "0.1", "--steps", "60", "--delta", "1e-5"]
    main(["calibrate", *words, *numbers, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert holds(found["risk"])
    main(["calibrate", *words, *numbers])
    told = capsys.readouterr().out
    assert f"(target {words[0][2:].replace('-', '_')}=" in told
    assert "Whoever sees everything released" in told
    with pytest.raises(SystemExit):
        main(["calibrate", *words, "--epsilon", "3", *numbers])
    assert "not allowed with argument" in capsys.readouterr().err
