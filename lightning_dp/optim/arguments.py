"""Arguments that the optimizers share."""

from __future__ import annotations

from lightning_dp.validate import number, shown


def check_adam_arguments(lr: float, betas: object, eps: float, weight_decay: float) -> tuple[float, float]:
    """Raise ``ValueError`` unless the numbers are those of an Adam; give β₁ and β₂, which YAML writes as a list."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        at_least_zero(name, value)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"betas={shown(betas)}: expected two numbers in [0, 1), such as [0.9, 0.999].")
    for value in betas:
        decay("betas", value)
    return float(betas[0]), float(betas[1])


def at_least_zero(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` is finite and at least 0."""
    if not 0 <= number(name, value) < float("inf"):
        raise ValueError(f"{name}={value}: expected a finite number of at least 0.")


def decay(name: str, value: float) -> None:
    """Raise ``ValueError`` unless ``value`` lies in [0, 1)."""
    if not 0 <= number(name, value) < 1:
        raise ValueError(f"{name}={value}: expected a number in [0, 1), such as 0.9.")


def check_floor(floor: float) -> None:
    """Raise ``ValueError`` unless ``floor`` is a finite number above 0."""
    if not 0 < number("floor", floor) < float("inf"):
        raise ValueError(f"floor={floor}: expected a number above 0, in units of the noise's variance, such as 0.1.")
