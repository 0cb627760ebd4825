"""What ``secure=True`` asks for, refuses and says."""

from __future__ import annotations

from lightning_dp.mechanism.grid import RESOLUTION
from lightning_dp.mechanism.keystream import check_cryptography

CAVEATS = (
    "the noise is an exact discrete Gaussian on integers, but each example's gradient comes from floating-point kernels, "
    "which are taken to be functions of that example and the weights alone",
)
"""What a statement says in place of the caveat on floating-point noise."""


def resolution(secure: bool) -> int | None:
    """Δ of the plan: how many units of the grid the clip norm has, or ``None`` for noise in floating point."""
    return RESOLUTION if secure else None


def check_secure(secure: bool, *, seed: int | None, noise_multiplier: float | None, engine: str) -> None:
    """Refuse what goes against secure noise.

    Args:
        secure: whether it is asked for.
        seed: of the run.
        noise_multiplier: σ, if it is given.
        engine: the name of the engine asked for.

    Raises:
        ValueError: see the message.
        MissingSecureExtraError: the package ``cryptography`` is not installed.
    """
    if not secure:
        return
    if seed is not None:
        raise ValueError(
            f"seed={seed} with secure=True: expected seed=None. Whoever knows a seed can take the noise away. Leave out one of "
            "the two."
        )
    if noise_multiplier == 0:
        raise ValueError(
            "noise_multiplier=0 with secure=True: expected noise, since there is nothing else to make secure. Give a "
            "noise_multiplier above 0, or leave out secure=True."
        )
    if engine not in ("auto", "loop"):
        raise ValueError(
            f"engine={engine!r} with secure=True: expected 'auto' or 'loop'. Sums are exact if every example is rounded before "
            "anything is added, and worked on alone; the other engines add examples up in floating point."
        )
    check_cryptography()
