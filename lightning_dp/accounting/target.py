"""A budget that is a risk and no ε: what is asked for, and whether a run keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from scipy.special import ndtri

from lightning_dp.accounting.phase import Phase
from lightning_dp.accounting.tradeoff import curve_of, gaussian_mu
from lightning_dp.validate import number, shown

RiskName = Literal["advantage", "tpr_at_fpr", "mu"]
NAMES: tuple[RiskName, ...] = ("advantage", "tpr_at_fpr", "mu")
"""As arguments of ``DifferentialPrivacy`` and options of ``lightning-dp calibrate``."""
_LARGEST_MU = 10.0


@dataclass(frozen=True, slots=True)
class RiskTarget:
    """The most that may be risked by a run, one of the bounds of :class:`~lightning_dp.accounting.risk.Risk`.

    Args:
        name: ``"advantage"``, TPR − FPR of the best test; ``"tpr_at_fpr"``, TPR at a given FPR; or ``"mu"`` of Gaussian DP.
        value: the most that it may be.
        fpr: the false positive rate, with ``"tpr_at_fpr"``.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> RiskTarget("advantage", 0.1).holds([Phase(3.0, 1.0, 1)]), str(RiskTarget("tpr_at_fpr", 0.02, 0.01))
        (False, 'tpr_at_fpr=[0.02, 0.01]')
    """

    name: RiskName
    value: float
    fpr: float | None = None

    def __post_init__(self) -> None:
        value = number(self.name, self.value)
        if self.name == "tpr_at_fpr":
            fpr = number("tpr_at_fpr", self.fpr)
            if not 1e-6 <= fpr < value < 1:
                raise ValueError(
                    f"tpr_at_fpr=[{value}, {fpr}]: expected two rates, 1e-6 <= FPR < TPR < 1, the true positive rate first, "
                    "such as [0.02, 0.01]."
                )
        elif not 0 < value < (1 if self.name == "advantage" else _LARGEST_MU):
            most = 1 if self.name == "advantage" else _LARGEST_MU
            raise ValueError(f"{self.name}={value}: expected a number above 0 and below {most:g}.")

    @classmethod
    def of(cls, advantage: object = None, tpr_at_fpr: object = None, mu: object = None) -> RiskTarget | None:
        """The target of these arguments, of which at most one is given.

        Raises:
            ValueError: more than one is given, or a number is out of range.
        """
        given = {
            name: value for name, value in zip(NAMES, (advantage, tpr_at_fpr, mu), strict=True) if value is not None
        }
        if len(given) > 1:
            asked = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
            raise ValueError(f"{asked}: expected at most one of them. Leave out the others.")
        for name, value in given.items():
            if name != "tpr_at_fpr":
                return cls(name, number(name, value))
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ValueError(f"tpr_at_fpr={shown(value)}: expected two rates, TPR and FPR, such as [0.02, 0.01].")
            return cls(name, number(name, value[0]), number(name, value[1]))
        return None

    def risk(self, phases: Sequence[Phase], total_variation: float = 0.0) -> float:
        """The bound on what is risked by ``phases``, composed, and anything within this distance."""
        mu = gaussian_mu(phases) if self.name == "mu" and total_variation == 0.0 else None
        if mu is not None:
            return mu
        curve = curve_of(phases).but_for(total_variation)
        if self.name == "advantage":
            return curve.advantage
        return curve.mu() if self.fpr is None else float(curve.tpr(self.fpr)[0])

    def holds(self, phases: Sequence[Phase], total_variation: float = 0.0) -> bool:
        """Whether ``phases`` risk no more than this."""
        return self.risk(phases, total_variation) <= self.value

    @property
    def as_mu(self) -> float:
        """μ of the Gaussian mechanism that risks as much: where a search begins."""
        if self.name == "advantage":
            return float(2.0 * ndtri((1.0 + self.value) / 2.0))
        return self.value if self.fpr is None else float(ndtri(self.value) - ndtri(self.fpr))

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}" if self.fpr is None else f"{self.name}=[{self.value:g}, {self.fpr:g}]"
