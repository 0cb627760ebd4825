"""What an audit found, in numbers and in words."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from lightning_dp.audit.guesses import Guesses

CONSISTENT, VIOLATED = "consistent", "violated"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """One lower bound on ε, and what it supposes.

    Args:
        name: ``"epsilon_delta"``, ``"curve"``, ``"gaussian_pair"`` or ``"plan_law"``.
        epsilon: with the audit's confidence ε is at least this, if what is supposed holds; ``None`` if there is no such bound.
        supposes: the assumption, as the end of a sentence that begins with "if". A planted bug may break it.
        note: why there is none, or what else there is to know.
    """

    name: str
    epsilon: float | None
    supposes: str
    note: str = ""

    def __str__(self) -> str:
        number = "    no bound" if self.epsilon is None else f"{self.epsilon:8.3f} ≤ ε"
        return f"{number}  {self.name}: if {self.supposes}{f' ({self.note})' if self.note else ''}"


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """What an audit found.

    Args:
        epsilon_lower: with ``confidence``, the run is not (ε, δ)-private for any ε below this, whatever the run does.
        confidence: of ``epsilon_lower``, both attacks together, and of each of the ``bounds``.
        epsilon_claimed: the upper bound that the run's statement claims.
        delta: δ of both.
        bounds: lower bounds on ε from the same run, from the one that supposes least to the one that supposes most. The
            first is ``epsilon_lower``. Only the first two count for the verdict.
        plan_p_value: how likely the white-box guesses, or better ones, are if every step follows the plan; ``None``
            where there were none, or the plan has no noise.
        verdict: ``"violated"`` if the guesses refute the claim, its ε or its whole trade-off curve, or ``plan_p_value`` is
            below :data:`~lightning_dp.audit.judge.NOT_THE_PLAN`; ``"consistent"`` otherwise.
        attacks: the guesses of each attack.
    """

    epsilon_lower: float
    confidence: float
    epsilon_claimed: float
    delta: float
    bounds: tuple[Bound, ...]
    plan_p_value: float | None
    verdict: str
    attacks: tuple[Guesses, ...]

    def bound(self, name: str) -> float | None:
        """The ε of the bound of this name."""
        return next(one.epsilon for one in self.bounds if one.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for strict JSON (an infinite ε is ``"inf"``)."""
        return {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}

    def __str__(self) -> str:
        tried = "; ".join(
            f"{g.attack}: {g.correct} of {g.guesses} guesses right, {g.canaries} canaries" for g in self.attacks
        )
        told = "" if self.plan_p_value is None else f"guesses this good under the plan: p = {self.plan_p_value:.2g} "
        return "\n".join(
            [
                f"{self.verdict}: {self.epsilon_lower:.3f} ≤ ε with confidence {self.confidence:g}, claimed "
                f"ε ≤ {self.epsilon_claimed:.4g} at δ = {self.delta:g}; {told}({tried})",
                f"Lower bounds on ε from this run, each with confidence {self.confidence:g}:",
                *map(str, self.bounds),
            ]
        )
