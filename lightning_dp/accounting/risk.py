"""What a guarantee means for one person: the risk of being found out or reconstructed, and the curve behind ε and δ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from decimal import ROUND_CEILING, Decimal
from functools import lru_cache
from typing import Any

import numpy as np

from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.tradeoff import curve_of, gaussian_mu

RATES = (0.001, 0.01, 0.1)
"""False positive rates for which TPR is given."""
PRIORS = (0.01, 0.1)
"""What somebody without the release would reconstruct rightly, for which reconstruction is bounded."""
DELTAS = tuple(float(f"1e-{power}") for power in range(1, 11))
"""δ at which ε is given."""


@dataclass(frozen=True, kw_only=True)
class Risk:
    """Upper bounds that hold for whoever sees everything released and knows all other examples.

    Args:
        mu: μ for which the mechanism is μ-GDP: no test between the two neighbouring datasets does better than one between
            N(0, 1) and N(μ, 1), among tests with errors of at least 1e-10.
        mu_regret: Δ in [0, 1]: how far the true curve of tests lies from that of μ at most; small where μ says it all.
        advantage: TPR − FPR, of the best test.
        tpr_at_fpr: false positive rate → the largest true positive rate.
        reconstruction_at_prior: κ → the probability with which a record is reconstructed that would be with probability κ by
            chance, without the release.
        epsilon_at_delta: δ → ε: ten points of the curve.

    Example:
        >>> risk = risk_of([Phase(3.0, 4096 / 50000, 875)])
        >>> round(risk.mu, 2), round(risk.tpr_at_fpr["0.001"], 3), risk.advantage < 0.33
        (0.85, 0.013, True)

    Source: Gomez et al. 2025 (arXiv 2503.10945) for μ and its regret; Dong, Roth and Su 2022 (arXiv 1905.02383) for tests;
    Hayes, Balle and Mahloujifar 2023 (arXiv 2302.07225), Theorem 2, for reconstruction: guessing a record that chance alone
    would get right with probability κ is a test of false positive rate κ.
    """

    mu: float
    mu_regret: float
    advantage: float
    tpr_at_fpr: dict[str, float]
    reconstruction_at_prior: dict[str, float]
    epsilon_at_delta: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for strict JSON, ∞ as ``"inf"``."""
        found: dict[str, Any] = finite(asdict(self))
        return found

    def sentence(self, unit: str = "example") -> str:
        """The risk at a false positive rate of 0.1 %, in words.

        Args:
            unit: who is protected.
        """
        fpr = RATES[0]
        return (
            f"Whoever sees everything released and already suspects one {unit} of being in the data is right at most "
            f"{percent(self.tpr_at_fpr[f'{fpr:g}'])} of the time when wrong {percent(fpr)} of the time"
        )


def risk_of(phases: Sequence[Phase], total_variation: float = 0.0) -> Risk:
    """The risk of all ``phases`` composed.

    Args:
        phases: what was composed, as the ledger has it.
        total_variation: τ, how far the run is from that, as of :class:`~lightning_dp.accounting.slack.Slack`.
    """
    return _risk_of(tuple(phase for phase in phases if phase.steps), total_variation)


@lru_cache(maxsize=32)
def _risk_of(phases: tuple[Phase, ...], total_variation: float) -> Risk:
    curve = curve_of(phases).but_for(total_variation)
    mu = gaussian_mu(phases) if total_variation == 0.0 and phases else None
    found = curve.mu() if mu is None else mu
    tpr = curve.tpr(np.array([*RATES, *PRIORS]))
    return Risk(
        mu=found,
        mu_regret=curve.regret(found) if mu is None else 0.0,
        advantage=curve.advantage,
        tpr_at_fpr={f"{rate:g}": float(one) for rate, one in zip(RATES, tpr, strict=False)},
        reconstruction_at_prior={
            f"{prior:g}": float(one) for prior, one in zip(PRIORS, tpr[len(RATES) :], strict=True)
        },
        epsilon_at_delta={f"{delta:g}": curve.epsilon_at(delta) for delta in DELTAS},
    )


def in_lines(risk: Risk, unit: str = "example") -> str:
    """All of it but the curve, for people, one bound on a line.

    Args:
        risk: what is shown.
        unit: who is protected.
    """
    tests = ", ".join(f"{percent(tpr)} (wrong {percent(float(fpr))})" for fpr, tpr in risk.tpr_at_fpr.items())
    records = ", ".join(f"{percent(p)} (prior {percent(float(k))})" for k, p in risk.reconstruction_at_prior.items())
    return (
        f"  μ of Gaussian DP        ≤ {round_up(risk.mu)}, with a regret of {risk.mu_regret:.2g}\n"
        f"  membership, right       ≤ {tests}\n"
        f"  membership, advantage   ≤ {percent(risk.advantage)}\n"
        f"  reconstruction          ≤ {records}\n"
        f"{risk.sentence(unit)}."
    )


def round_up(value: float) -> str:
    """``value`` rounded up to three significant digits, so that what is printed is still an upper bound.

    Example:
        >>> round_up(3.6118), round_up(8.0), round_up(0.0), round_up(12.301)
        ('3.62', '8.00', '0', '12.4')
    """
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    exact = Decimal(value)
    return f"{exact.quantize(Decimal(1).scaleb(exact.adjusted() - 2), rounding=ROUND_CEILING):f}"


def percent(share: float) -> str:
    """``share`` in per cent, rounded up to two significant digits.

    Example:
        >>> percent(0.001), percent(0.00912), percent(0.5), percent(1.0)
        ('0.1 %', '0.92 %', '50 %', '100 %')
    """
    if share <= 0.0:
        return "0 %"
    digits = 1 - math.floor(math.log10(share * 100.0))
    scaled = math.ceil(share * 100.0 * 10.0**digits * (1.0 - 1e-12))
    return f"{min(100.0, scaled / 10.0**digits):g} %"


def finite(value: Any) -> Any:
    """For strict JSON: every ∞ in dicts as ``"inf"``."""
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return "inf" if isinstance(value, float) and math.isinf(value) else value
