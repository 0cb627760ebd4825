"""ε of a run that is only close to the mechanism that the accountant composes: a part of δ pays for the slack."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lightning_dp.accounting.curve import MechanismCurve
from lightning_dp.accounting.epsilon import EpsilonBound
from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.slack import Slack
from lightning_dp.plan.mechanism import Mechanism

SHARES = (0.0, 1e-3, 1e-2, 0.1, 0.5)
"""The parts of δ that may be set aside. The smallest one that suffices is taken."""

_MANY = 10**9


class ReservedCurve:
    """Upper bounds on ε after a history and further steps, when a part of δ is set aside for a :class:`Slack`.

    With share ρ set aside, ε is the accountant's bound at (1 - ρ)δ, and it holds if (1 + e^ε)·τ ≤ ρδ, with τ the
    slack of all steps so far. Where every step runs as the accountant composes it, τ = 0, nothing is set aside and
    this is :class:`~lightning_dp.accounting.curve.MechanismCurve`.

    Args:
        history: phases already spent.
        spent: the slack of those phases.
        mechanism: of the steps to come.
        delta: δ, in (0, 1).
        each: the slack of each step to come.
        begun: see :class:`~lightning_dp.accounting.curve.MechanismCurve`.

    Example:
        >>> step = Mechanism.of(noise_multiplier=3.0, clip_norm=1.0, dataset_size=50_000, expected_batch_size=4096)
        >>> plain = ReservedCurve((), Slack(), step, 1e-5, Slack()).at(100)
        >>> cut = ReservedCurve((), Slack(), step, 1e-5, Slack(truncation=1e-12)).at(100)
        >>> plain.epsilon < cut.epsilon < plain.epsilon + 1e-3
        True
    """

    def __init__(
        self,
        history: Sequence[Phase],
        spent: Slack,
        mechanism: Mechanism,
        delta: float,
        each: Slack,
        begun: int = 0,
    ) -> None:
        self._spent, self._each, self._delta = spent, each, delta
        self._curve_at: Callable[[float], MechanismCurve] = lambda left: MechanismCurve(history, mechanism, left, begun)
        self._curves: dict[float, MechanismCurve] = {}
        self._curve(0.0)  # which checks the numbers

    def at(self, steps: int) -> EpsilonBound:
        """The bound after the history followed by ``steps`` steps; ``inf`` if half of δ cannot pay for the slack.

        Raises:
            ValueError: ``steps`` is negative.
        """
        slack = self._slack(steps)
        bound = EpsilonBound(math.inf, "exact")
        for share in self._shares(slack):
            bound = self._curve(share).at(steps)
            if math.isinf(bound.epsilon) or slack.costs(bound.epsilon) <= share * self._delta:
                return bound
        return EpsilonBound(
            math.inf,
            bound.accountant,
            "the run is too far from the mechanism that can be accounted for: δ cannot pay for it",
        )

    def rdp_steps(self, epsilon: float) -> float:
        """A number of further steps that surely stays within ``epsilon``, by RDP alone (possibly ``inf``)."""
        for share in self._shares(self._slack(1)):
            steps = self._curve(share).rdp_steps(epsilon)
            if self._slack(int(min(steps, _MANY))).costs(epsilon) <= share * self._delta:
                return steps if self._each == Slack() else min(steps, _MANY)
        return 0.0

    def _slack(self, steps: int) -> Slack:
        return self._spent + self._each * max(steps, 0)

    @staticmethod
    def _shares(slack: Slack) -> Sequence[float]:
        return SHARES[:1] if slack.total_variation == 0.0 else SHARES[1:]

    def _curve(self, share: float) -> MechanismCurve:
        if share not in self._curves:
            self._curves[share] = self._curve_at(self._delta * (1.0 - share))
        return self._curves[share]


def noise_with_reserve(
    find: Callable[[float], float], epsilon: float, delta: float, slack: Callable[[float], Slack]
) -> float:
    """The σ that ``find`` gives when the smallest sufficient part of δ is set aside.

    Args:
        find: the smallest σ that reaches ``epsilon`` at the δ it is given.
        epsilon: the target ε.
        delta: δ.
        slack: that of the whole run, history included, at a σ. It must not grow with σ.

    Returns:
        σ. With it :class:`ReservedCurve` stays within ``epsilon``, unless even half of δ is too little for the
        slack; the curve is infinite then.
    """
    sigma = math.nan
    for share in SHARES:
        sigma = find(delta * (1.0 - share))
        if slack(sigma).costs(epsilon) <= share * delta:
            break
    return sigma
