"""What adapts C lies in the one vector that is bounded and noised, and C of the next step follows from what was released."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import lightning_dp.mechanism.adaptive as adaptive_module
import lightning_dp.mechanism.release as release_module
from lightning_dp.mechanism.adaptive import INDICATOR, beside, in_force, nothing_beside, released_beside
from lightning_dp.mechanism.clip import clip_and_sum
from lightning_dp.mechanism.randomness import RandomKey
from lightning_dp.mechanism.release import release
from lightning_dp.mechanism.state import NOTHING, MechanismState
from lightning_dp.plan.adaptation import Quantile, Slack, adaptation_of
from lightning_dp.plan.clipping import Clipping, ClippingStyle
from lightning_dp.plan.mechanism import Event
from tests.guarantees.mutations import caught, patched
from tests.mechanism.laws import CAUGHT, FALSE_ALARM, plan, standard_normal_p_values

STYLES: list[ClippingStyle] = ["quantile", "slaclip"]


def contribution(norm: float, clipping: Clipping) -> Tensor:
    """One example's vector, of a gradient of that norm."""
    sums, _ = clip_and_sum({"w": torch.tensor([[0.6, 0.8]], dtype=torch.float64) * norm}, clipping)
    assert list(sums) == ["w", INDICATOR]
    return torch.cat([part.flatten() for part in sums.values()])


def the_vector_is_bounded(rule: Quantile | Slack, norm: float, clip_norm: float) -> None:
    style: ClippingStyle = "quantile" if isinstance(rule, Quantile) else "slaclip"
    clipping = Clipping(clip_norm, style, adaptation=rule)
    assert float(contribution(norm, clipping).norm()) <= clipping.sensitivity * (1 + 2**-40)


@given(
    norm=st.one_of(st.floats(0, 3), st.floats(0, 1e30)),
    clip_norm=st.sampled_from([1e-3, 1.0, 1.5, 40.0]),
    rule=st.one_of(
        st.builds(Quantile, weight=st.floats(1e-3, 10)), st.builds(Slack, bins=st.integers(1, 30))
    ),
)  # fmt: skip
def test_gradient_and_coordinates_together_stay_within_the_bound(
    rule: Quantile | Slack, norm: float, clip_norm: float
) -> None:
    the_vector_is_bounded(rule, norm, clip_norm)


def test_coordinates_that_do_not_fit_into_the_bound_are_noticed() -> None:
    the_vector_is_bounded(Quantile(weight=2.0), 3.0, 1.0)
    with caught(patched((Quantile, "stretch", 1.0))):  # as if the coordinate were nothing
        the_vector_is_bounded(Quantile(weight=2.0), 3.0, 1.0)
    the_vector_is_bounded(Slack(bins=4), 0.5, 1.0)
    with caught(patched((adaptive_module, "beside", lambda norms, clipping: beside(norms, clipping) * 2))):
        the_vector_is_bounded(Slack(bins=4), 0.5, 1.0)


def test_the_noise_of_the_gradient_is_that_of_the_published_theorem() -> None:
    """Andrew et al. 2021, Theorem 1: z_Δ = (z⁻² − (2σ_b)⁻²)^(−½), where σ_b is the noise of the count."""
    mechanism = plan(clipping="quantile", quantile_weight=0.7).mechanism
    z, of_count = 1.5, mechanism.noise_std / (0.7 * 0.8)
    assert mechanism.noise_std / 0.8 == pytest.approx((z**-2 - (2 * of_count) ** -2) ** -0.5, rel=1e-12)
    assert mechanism.event() == Event(1.5, 7 / 40)


@pytest.mark.parametrize("style", STYLES)
def test_the_divisor_is_public_and_an_example_that_is_not_finite_adds_nothing(style: ClippingStyle) -> None:
    clipping = Clipping(1.0, style)
    assert beside(torch.tensor([math.nan, math.inf]), clipping).abs().sum() == 0
    assert clip_and_sum({"w": torch.tensor([[math.nan]])}, clipping)[0][INDICATOR].abs().sum() == 0
    assert beside(torch.tensor([0.25]), Clipping(1.0)).shape == (1, 0)
    assert nothing_beside({"w": torch.zeros(2)}, Clipping(1.0)) == {}


@pytest.mark.parametrize("bins", [1, 4])
def test_the_slots_fill_up_one_after_the_other(bins: int) -> None:
    """By the rule as it is written: √K·(C − u) = a·λ + b, a slots of λ and one of b."""
    c = 2.0
    for u in np.linspace(0, 2.5, 23):
        full, left = c / math.sqrt(bins), math.sqrt(bins) * max(c - u, 0.0)
        whole = min(int(left / full + 1e-12), bins)
        slots = [full] * whole + ([left - whole * full] if whole < bins else []) + [0.0] * bins
        found = beside(torch.tensor([u], dtype=torch.float64), Clipping(c, "slaclip", adaptation=Slack(bins)))
        assert found[0].tolist() == pytest.approx(slots[:bins], abs=1e-9)


def follows(style: ClippingStyle, clip_norm: float, steps: int, **numbers: Any) -> float:
    """C after some steps over examples whose norms are 1, ..., 9, all of them drawn."""
    gradients = {"w": torch.arange(1.0, 10.0, dtype=torch.float64).unsqueeze(1)}
    mechanism = plan(
        clipping=style, clip_norm=clip_norm, noise_multiplier=0.05, expected_batch_size=9, dataset_size=9, **numbers
    ).mechanism
    state, key = NOTHING, RandomKey.from_seed(1)
    for step in range(steps):
        sums, _ = clip_and_sum(gradients, in_force(mechanism, state).clipping)
        before = state
        gradient, state, noise_std = release(sums, mechanism, key, step, state=state)
        assert list(gradient) == ["w"]
        assert noise_std == in_force(mechanism, before).noise_std / mechanism.divisor
    return in_force(mechanism, state).clipping.clip_norm


@pytest.mark.parametrize("begin", [0.1, 100.0])
def test_c_comes_to_the_quantile_from_wherever_it_begins(begin: float) -> None:
    assert 4 < follows("quantile", begin, 80) < 6
    assert 7 < follows("quantile", begin, 160, clip_quantile=0.85) < 9
    assert 2 < follows("slaclip", begin, 80) < 12


class TestTheRelease:
    """Released are the gradient with noise of σS, and the coordinates with the same noise."""

    sums = {"w": torch.zeros(3000), INDICATOR: torch.zeros(1)}

    def of(self, steps: int, state: MechanismState) -> tuple[list[float], Tensor, MechanismState]:
        mechanism, found = plan(clipping="quantile", quantile_weight=1.0, clip_learning_rate=1e-9).mechanism, []
        gradient: dict[str, Tensor] = {}
        for step in range(steps):
            gradient, state, _ = release(self.sums, mechanism, RandomKey.from_seed(5), step, state=state)
            found += released_beside(state)
        return found, gradient["w"], state

    def law(self) -> float:
        clip_norm = 3.0
        state = MechanismState({"clipping": {"style": "quantile", "clip_norm": clip_norm, "released": [0.0]}})
        std = 1.5 * clip_norm * math.sqrt(1.25) / 7
        beside_, gradient, _ = self.of(400, state)
        p = standard_normal_p_values(np.array(beside_) / std)
        return min(p["mean"], p["variance"], min(standard_normal_p_values(gradient.numpy() / std).values()))

    def test_is_noised_from_the_c_that_the_state_holds(self) -> None:
        assert self.law() > FALSE_ALARM
        with patched((release_module, "in_force", lambda mechanism, state: mechanism)):  # the noise of C at first
            assert self.law() < CAUGHT

    def test_carries_on_what_others_keep_in_the_state(self) -> None:
        _, _, state = self.of(2, MechanismState({"noise": [1, 2]}))
        assert state.values["noise"] == [1, 2]
        assert MechanismState.read(state.state_dict()) == state


def test_what_is_no_clip_norm_is_refused() -> None:
    mechanism = plan(clipping="quantile").mechanism
    for wrong in (math.nan, math.inf, -1.0, "1", None, 1e30):
        with pytest.raises(ValueError, match=r"clip.norm"):
            in_force(mechanism, MechanismState({"clipping": {"style": "quantile", "clip_norm": wrong}}))
    with pytest.raises(ValueError, match="clip norm"):
        in_force(mechanism, MechanismState({"clipping": 3}))
    with pytest.raises(RuntimeError, match="expected finite numbers"):
        release({"w": torch.zeros(2), INDICATOR: torch.tensor([math.nan])}, mechanism, RandomKey.from_seed(0), 0)


def test_of_another_style_nothing_is_taken_over() -> None:
    state = MechanismState({"clipping": {"style": "quantile", "clip_norm": 9.0, "released": [0.0]}})
    assert in_force(plan(clipping="quantile").mechanism, state).clipping.clip_norm == 9.0
    for style in ("slaclip", "flat"):
        assert in_force(plan(clipping=style).mechanism, state) == plan(clipping=style).mechanism


def test_a_clip_norm_stays_what_it_can_be() -> None:
    for z in (-1e30, 1e30):
        assert 1e-12 <= Quantile().next_clip_norm([z], 1.0) <= 1e12
        assert 1e-12 <= Slack().next_clip_norm([z] * 10, 1.0) <= 1e12


@pytest.mark.parametrize(
    ("style", "numbers", "said"),
    [
        ("flat", {"clip_quantile": 0.5}, r"clip_quantile=0.5 with clipping='flat': expected it with clipping='quantile' alone"),
        ("quantile", {"slack_bins": 3}, r"slack_bins=3 with clipping='quantile': expected it with clipping='slaclip' alone"),
        ("quantile", {"clip_quantile": 1.0}, r"clip_quantile=1.0: expected a number between 0 and 1"),
        ("quantile", {"quantile_weight": math.nan}, r"quantile_weight=nan: expected a number above 0"),
        ("slaclip", {"clip_learning_rate": 0.0}, r"clip_learning_rate=0.0: expected a number above 0"),
        ("slaclip", {"slack_bins": 0}, r"slack_bins=0: expected at least 1"),
    ],
)  # fmt: skip
def test_numbers_that_mean_nothing_are_refused(style: str, numbers: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        adaptation_of(style, **numbers)


def test_a_rule_that_is_not_the_styles_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing adapts C there"):
        Clipping(1.0, "flat", adaptation=Quantile())
    with pytest.raises(ValueError, match="expected a Slack"):
        Clipping(1.0, "slaclip", adaptation=Quantile())
