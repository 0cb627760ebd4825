"""The errors of this package, for ``except`` and for reading; each is defined where it is raised.

>>> from lightning_dp.errors import BudgetExceededError, PreflightError

All but :class:`PreflightError` are imported when they are asked for, so that naming one costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "BatchAxisError": "batches.microbatch",
    "BudgetExceededError": "accounting.ledger",
    "DataError": "data.images",
    "DisagreementError": "engines.agreement",
    "DroppedExamplesError": "loading.rows",
    "EngineError": "engines.select",
    "HeldRecordsError": "loading.held_records",
    "JournalError": "record.journal_line",
    "LayerOrderError": "ranks.layerwise",
    "LightningMovedError": "lightning_internals",
    "LogicalBatchConsumedError": "loading.loader",
    "MissingExtraError": "models.extra",
    "MissingSecureExtraError": "mechanism.keystream",
    "RankLostError": "ranks.lost_ranks",
    "ReportError": "reporting.runs",
    "SharedWriteError": "engines.shared_writes",
    "UnsafeCheckpointError": "record.sharded_checkpoint",
    "VerificationError": "audit.verdict",
    "ViewError": "batches.views",
    "WeightsError": "models.public_weights",
    "WriteError": "step.contents",
}

__all__ = ["PreflightError", *_HOMES]


class PreflightError(ValueError):
    """Training cannot be private as configured. The message names the value, the expectation and the remedy."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"lightning_dp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
