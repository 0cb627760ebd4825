"""ε as a function of the steps of one mechanism after a history, whatever it is that its accountant composes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_dp.accounting.epsilon import EpsilonBound, EpsilonCurve, epsilon_bound
from lightning_dp.accounting.phase import Phase, phase_of
from lightning_dp.plan.mechanism import Mechanism
from lightning_dp.plan.privacy_plan import check_delta


class MechanismCurve:
    """Upper bounds on ε after ``history`` and any number of further steps of ``mechanism``.

    Args:
        history: phases already spent.
        mechanism: of the steps to come.
        delta: δ, in (0, 1).
        begun: how many steps of ``mechanism`` were taken with the randomness that goes on; they are not in ``history``.
            0 for a memoryless mechanism.
    """

    def __init__(self, history: Sequence[Phase], mechanism: Mechanism, delta: float, begun: int = 0) -> None:
        self._history, self._mechanism, self._delta, self._begun = tuple(history), mechanism, delta, begun
        self._curves: dict[Phase, EpsilonCurve] = {}
        check_delta(delta)

    def at(self, steps: int) -> EpsilonBound:
        """The bound after the history followed by ``steps`` steps.

        Raises:
            ValueError: ``steps`` is negative.
        """
        if steps < 0:
            raise ValueError(f"steps={steps}: expected a non-negative number of steps after the history.")
        phase = self._phase(steps)
        if any(one.law != "poisson" for one in (phase, *self._history)):
            return epsilon_bound([*self._history, phase], self._delta)
        return self._curve(phase).at(phase.steps)

    def rdp_steps(self, epsilon: float) -> float:
        """A number of further steps that surely stays within ``epsilon``, found without a search (possibly ``inf``)."""
        return self._curve(self._phase(0)).rdp_steps(epsilon) if self._mechanism.memoryless else 0.0

    def _phase(self, steps: int) -> Phase:
        return phase_of(self._mechanism, self._begun + steps)

    def _curve(self, phase: Phase) -> EpsilonCurve:
        alike = replace(phase, steps=0)
        if alike not in self._curves:
            numbers = alike.noise_multiplier, alike.sampling_probability
            self._curves[alike] = EpsilonCurve(self._history, *numbers, self._delta, alike.seldom)
        return self._curves[alike]
