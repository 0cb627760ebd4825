"""What a user may give to :class:`~lightning_dp.DifferentialPrivacy`: every argument is checked when it is made."""

from __future__ import annotations

import math
from typing import Any

from lightning_dp.batches.axis import check_batch_axis_argument
from lightning_dp.engines.select import check_engine_name
from lightning_dp.look.batch_size.physical import check_physical_batch_size
from lightning_dp.mechanism.secure import check_secure
from lightning_dp.plan.clipping import check_clip_norm, check_clipping
from lightning_dp.plan.mechanism import check_noise_multiplier
from lightning_dp.plan.privacy_plan import check_delta, check_epsilon
from lightning_dp.plan.simulation import check_simulation
from lightning_dp.validate import shown, truth, whole

SWITCHES = ("secure", "static_shapes", "log_train_metrics")
COUNTS = ("expected_batch_size", "dataset_size", "max_batch_size")


def check_arguments(given: Any) -> None:
    """Refuse numbers out of range, values of another type, and combinations that mean nothing.

    Args:
        given: what holds the arguments as attributes, under their names.

    Raises:
        ValueError: the message names the value, what was expected and the remedy.
    """
    epsilon, noise_multiplier, clip_norm = given.epsilon, given.noise_multiplier, given.clip_norm
    if (epsilon is None) == (noise_multiplier is None):
        raise ValueError(
            f"epsilon={shown(epsilon)}, noise_multiplier={shown(noise_multiplier)}: expected exactly one of them. Give epsilon "
            "to have the noise found for a budget, or noise_multiplier to have ε computed."
        )
    if epsilon is not None:
        check_epsilon(epsilon)
    if noise_multiplier is not None:
        check_noise_multiplier(noise_multiplier)
    check_delta(given.delta)
    check_clip_norm(clip_norm)
    check_clipping(given.clipping, given.automatic_gamma, clip_norm)
    check_engine_name(given.engine)
    check_simulation(given.simulate)
    check_batch_axis_argument(given.batch_axis)
    truth(**{name: getattr(given, name) for name in SWITCHES})
    check_secure(given.secure, seed=given.seed, noise_multiplier=noise_multiplier, engine=given.engine)
    check_physical_batch_size(given.physical_batch_size)
    for name in COUNTS:
        value = getattr(given, name)
        if value is not None and whole(name, value) < 1:
            raise ValueError(f"{name}={value}: expected at least 1, or None for the default.")
    if given.seed is not None:
        whole("seed", given.seed)
    if math.isinf(clip_norm) and noise_multiplier != 0:
        raise ValueError(
            f"clip_norm={clip_norm}: expected a finite number. Without clipping no finite noise protects anybody; only "
            "noise_multiplier=0 (no privacy) goes with it."
        )
