"""The Rényi bound against dp_accounting's, order by order."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dp.accounting import Phase, rdp_epsilon
from lightning_dp.accounting.rdp import _SHIFTED_ORDERS, log_moments, steps_within


@settings(max_examples=15)
@given(
    sigma=st.floats(0.4, 50.0),
    q=st.floats(1e-4, 0.99),
    steps=st.sampled_from([1, 30, 1000]),
    delta=st.sampled_from([1e-3, 1e-5, 1e-9]),
)
def test_agrees_with_dp_accounting(sigma: float, q: float, steps: int, delta: float) -> None:
    """Integer orders are closed forms there and integrals here; more orders can only lower ours."""
    theirs = RdpAccountant(orders=list(range(2, 65)))
    theirs.compose(SelfComposedDpEvent(PoissonSampledDpEvent(q, GaussianDpEvent(sigma)), steps))
    ours = rdp_epsilon([Phase(sigma, q, steps)], delta)
    assert 0 <= ours <= theirs.get_epsilon(delta) * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(("sigma", "q"), [(0.5, 0.3), (1.0, 0.01), (4.0, 0.08), (0.15, 0.5)])
def test_integer_orders_have_their_closed_form(sigma: float, q: float) -> None:
    """log E[e^{αL}] by the binomial theorem (Mironov, Talwar and Zhang 2019, section 3.3)."""
    moments = log_moments(sigma, q)
    for alpha in (2, 11):
        index = int(np.argmin(np.abs(_SHIFTED_ORDERS - (alpha - 1))))
        assert _SHIFTED_ORDERS[index] == pytest.approx(alpha - 1)
        total, coefficient = -np.inf, 0.0
        for k in range(alpha + 1):
            coefficient = coefficient + (np.log((alpha - k + 1) / k) if k else 0.0)
            term = coefficient + k * np.log(q) + (alpha - k) * np.log1p(-q) + (k * k - k) / (2 * sigma**2)
            total = np.logaddexp(total, term)
        assert moments[index] == pytest.approx(total, rel=1e-9)
        assert moments[index] >= total * (1 - 1e-12)


@pytest.mark.parametrize("sigma", [0.05, 0.099])
def test_little_noise_is_bounded_from_above(sigma: float) -> None:
    """Below σ = 0.1 a chord replaces the integral; it is at least order 2's closed form and falls with σ."""
    q = 0.01
    order_two = np.logaddexp(0.0, 2 * np.log(q) + 1 / sigma**2)
    index = int(np.argmin(np.abs(_SHIFTED_ORDERS - 1.0)))
    assert log_moments(sigma, q)[index] >= np.log1p(-(q**2)) + order_two - 1e-9
    assert rdp_epsilon([Phase(sigma, q, 10)], 1e-5) > rdp_epsilon([Phase(0.101, q, 10)], 1e-5)


@pytest.mark.parametrize("q", [0.05, 1.0])
def test_steps_within_is_the_inverse(q: float) -> None:
    history = [Phase(2.0, 0.1, 20)]
    steps = int(steps_within(history, Phase(3.0, q, 0), 1e-5, 4.0))
    assert steps > 0
    assert rdp_epsilon([*history, Phase(3.0, q, steps)], 1e-5) <= 4.0
    assert rdp_epsilon([*history, Phase(3.0, q, steps + 2)], 1e-5) > 4.0
    assert steps_within(history, Phase(0.0, q, 0), 1e-5, 4.0) == 0
    assert steps_within([Phase(0.5, 0.5, 100)], Phase(3.0, q, 0), 1e-5, 4.0) == 0
