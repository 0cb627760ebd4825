"""Train any LightningModule under differential privacy by adding one line.

    dataset → Poisson draw → micro-batches (→ K views) → per-example gradients → clip & sum → + noise → sum over ranks
            → ÷ expected batch → optimizer → average
    plan ──────────────────────────────────────────────────────────→ ledger → ε, logger, statement

>>> import lightning as L
>>> trainer = L.Trainer(max_steps=875, callbacks=[DifferentialPrivacy(epsilon=8.0, delta=1e-5)], logger=False)

Names are imported when first used, so that the accounting commands start without loading PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_dp.version import __version__

if TYPE_CHECKING:
    from lightning_dp.accounting import BudgetExceededError, Statement
    from lightning_dp.audit.verification import verify
    from lightning_dp.callbacks.adapters_moved import AdaptersMoved
    from lightning_dp.callbacks.augmentation import AugmentationMultiplicity
    from lightning_dp.callbacks.differential_privacy import DifferentialPrivacy
    from lightning_dp.callbacks.moving_average import ExponentialMovingAverage
    from lightning_dp.callbacks.progress_bar import StepProgressBar
    from lightning_dp.engines.select import EngineError
    from lightning_dp.errors import PreflightError
    from lightning_dp.layers.replacements import make_trainable_privately
    from lightning_dp.loading.held_records import HeldRecords
    from lightning_dp.plan.privacy_plan import PrivacyPlan
    from lightning_dp.strategy import PrivateDDPStrategy, PrivateModelParallelStrategy, PrivateSingleDeviceStrategy

_HOMES = {
    "AdaptersMoved": "callbacks.adapters_moved",
    "AugmentationMultiplicity": "callbacks.augmentation",
    "BudgetExceededError": "accounting",
    "DifferentialPrivacy": "callbacks.differential_privacy",
    "EngineError": "engines.select",
    "ExponentialMovingAverage": "callbacks.moving_average",
    "HeldRecords": "loading.held_records",
    "PreflightError": "errors",
    "PrivacyPlan": "plan.privacy_plan",
    "PrivateDDPStrategy": "strategy",
    "PrivateModelParallelStrategy": "strategy",
    "PrivateSingleDeviceStrategy": "strategy",
    "Statement": "accounting",
    "StepProgressBar": "callbacks.progress_bar",
    "make_trainable_privately": "layers.replacements",
    "verify": "audit.verification",
}

__all__ = [
    "AdaptersMoved",
    "AugmentationMultiplicity",
    "BudgetExceededError",
    "DifferentialPrivacy",
    "EngineError",
    "ExponentialMovingAverage",
    "HeldRecords",
    "PreflightError",
    "PrivacyPlan",
    "PrivateDDPStrategy",
    "PrivateModelParallelStrategy",
    "PrivateSingleDeviceStrategy",
    "Statement",
    "StepProgressBar",
    "__version__",
    "make_trainable_privately",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
