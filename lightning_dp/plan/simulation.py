"""A private run at a fraction of its cost: batch and noise divided, and nothing of its privacy kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_dp.plan.privacy_plan import PrivacyPlan
from lightning_dp.validate import whole


def check_simulation(simulate: int) -> None:
    """Raise ``ValueError`` unless ``simulate`` is a whole number of at least 1."""
    if whole("simulate", simulate) < 1:
        raise ValueError(
            f"simulate={simulate}: expected a whole number of at least 1: how many times smaller batch and noise are to be "
            "(1 trains for real)."
        )


def simulated(plan: PrivacyPlan, simulate: int) -> PrivacyPlan:
    """The plan of a run that behaves like ``plan``'s, with 1/S of its batch and of its noise.

    Both B and σ are divided by S; steps, epochs, δ, C and N stay. What serves a guarantee alone is left out: the target ε, the
    bound on a draw (of the real run, only draws that next to never happen are cut) and the grid of secure noise. The noise on
    the *mean* gradient is σ·C/B as before, so the learning rate stays as well: a step has the signal-to-noise ratio of the real
    one, but for the sampling of fewer examples. Its privacy is another matter: σ/S at q/S spends far more than σ at q once σ/S
    is small, so no target ε is kept, and the ledger counts what is really run.

    Args:
        plan: of the run that is simulated.
        simulate: S. 1 returns ``plan`` itself.

    Raises:
        ValueError: less than one example would be expected in a step.

    Example:
        >>> plan = PrivacyPlan(noise_multiplier=3.0, clip_norm=1.0, delta=1e-5, dataset_size=50000,
        ...                    expected_batch_size=4096, steps=875, target_epsilon=8.0)
        >>> small = simulated(plan, 16)
        >>> small.noise_multiplier, small.expected_batch_size, small.target_epsilon, small.steps
        (0.1875, 256.0, None, 875)

    Source: T. Sander, P. Stock and A. Sablayrolles, *TAN Without a Burn: Scaling Laws of DP-SGD*, ICML 2023
    (arXiv 2210.03403): B/σ and the number of steps are kept.
    """
    if simulate == 1:
        return plan
    if simulate > plan.expected_batch_size:
        raise ValueError(
            f"simulate={simulate} with expected_batch_size={plan.expected_batch_size:g}: expected at least one example in a "
            "step. Give a smaller simulate."
        )
    return plan.but(
        noise_multiplier=plan.noise_multiplier / simulate,
        expected_batch_size=plan.expected_batch_size / simulate,
        target_epsilon=None,
        max_batch_size=None,
        resolution=None,
        coordinates=None,
        simulation=simulate,
    )


def as_if_real(spent: Mapping[str, Any] | None, simulate: int) -> dict[str, Any] | None:
    """The state of a simulation's ledger with the numbers of the run it stands for, to plan the rest of it by.

    Args:
        spent: the state of a ledger, or ``None``.
        simulate: S.
    """
    if spent is None or simulate == 1:
        return None if spent is None else dict(spent)
    phases = []
    for phase in spent["phases"]:
        batch = float(round(phase["expected_batch_size"] * simulate))  # the real one was a whole number
        phases.append(
            {
                **phase,
                "noise_multiplier": phase["noise_multiplier"] * simulate,
                "expected_batch_size": batch,
                "sampling_probability": batch / phase["dataset_size"],
            }
        )
    return {**spent, "phases": phases}
