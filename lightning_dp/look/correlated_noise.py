"""What noise that is correlated over the steps takes from the optimizer, and where it would not protect."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_dp.errors import PreflightError
from lightning_dp.plan.correlation import INDEPENDENT
from lightning_dp.settings import PrivacySettings


def momentum_of(trainer: pl.Trainer) -> float:
    """The momentum that the first optimizer was made with, for which a matrix is found; of Adam its first β, 0 without any.

    It is public, and has to do with utility alone. What a schedule makes of it later does not matter.
    """
    given: dict[str, Any] = trainer.optimizers[0].defaults if trainer.optimizers else {}
    betas = given.get("betas")
    momentum: Any = given.get("momentum", betas[0] if isinstance(betas, (list, tuple)) and betas else 0.0)
    try:
        momentum = float(momentum)
    except (TypeError, ValueError):
        return 0.0
    return momentum if 0 <= momentum < 1 else 0.0


def check_goes_with_correlated_noise(privacy: PrivacySettings, trainer: pl.Trainer, unused_samples: int) -> None:
    """Refuse correlated noise where a step may leave its sample unused: rows of the strategy matrix are counted by samples.

    Args:
        privacy: what is asked for.
        trainer: with its module.
        unused_samples: how many samples were drawn in vain before.

    Raises:
        PreflightError: see the message.
    """
    if privacy.noise == INDEPENDENT:
        return
    if not trainer.lightning_module.automatic_optimization:
        raise PreflightError(
            f"noise={privacy.noise!r} with manual optimization: expected automatic optimization, where each step releases "
            "once. An example's parts in several steps add up in correlated noise, and which steps release is up to "
            "training_step. Leave out noise=, or optimize automatically."
        )
    if unused_samples:
        raise PreflightError(
            f"noise={privacy.noise!r} after {unused_samples} samples that no step used: expected a training whose every sample "
            "was used, as under automatic optimization. Leave out noise=, or start anew."
        )
