"""Which run a record is of: when it began, by which versions, of which plan and module. No line of it follows from the data."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import lightning.pytorch as pl
from torch.distributed.fsdp import FSDPModule
from torch.nn.parameter import is_lazy

from lightning_dp.accounting import Ledger
from lightning_dp.accounting.risk import finite
from lightning_dp.record.journal import Journal
from lightning_dp.record.written import digest_of

FORMAT = 1
"""Of what a record holds beside the statement; records of earlier versions have nothing."""
PACKAGES = ("torch", "lightning", "pytorch-lightning", "numpy", "scipy", "opacus", "prv-accountant")
_LONGEST = 2**18


def run_facts(trainer: pl.Trainer, ledger: Ledger, journal: Journal | None) -> dict[str, Any]:
    """What a record says of its run, as plain values.

    The time at which a record was *written* is left out: how long a run takes depends on the draws, and is covered by no
    guarantee.

    Args:
        trainer: with its module.
        ledger: with the plan in force.
        journal: of the fit, if one is kept.

    Returns:
        ``format``; ``id``, the name of the training in ``privacy.journal``, which fits that resume it share, and ``fit``, that
        of this fit; ``begun``, when the fit began, in UTC; ``versions``; ``plan``, the digest of the plan's numbers; and of
        ``module`` the class, and the digest of its parameters' names, shapes and types, and of which of them are trained.
    """
    return {
        "format": FORMAT,
        "id": None if journal is None else journal.lineage.training,
        "fit": None if journal is None else journal.name,
        "begun": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "plan": digest_of(ledger.plan.numbers),
        "module": module_facts(trainer.lightning_module),
    }


def numbers_of_run(ledger: Ledger, steps: int) -> dict[str, Any]:
    """All that the statement follows from: the plan in force, and the ledger as it is after ``steps`` steps in all.

    Of a training of very many stretches ``None``: the journal has them.
    """
    state = ledger.state_dict(steps)
    spent = {**state, "phases": [finite(phase) for phase in state["phases"]]}
    return {
        "plan": finite(ledger.plan.numbers),
        "ledger": spent if len(json.dumps(spent)) < _LONGEST else None,
    }


def module_facts(module: pl.LightningModule) -> dict[str, str]:
    """The class of a module, and a digest of what its parameters are, whatever their values, on any number of ranks."""
    kind = next(one for one in type(module).__mro__ if not issubclass(one, FSDPModule))
    parameters = [
        (name, None if is_lazy(one) else list(one.shape), str(one.dtype), one.requires_grad)
        for name, one in module.named_parameters()
    ]
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "digest": digest_of(sorted(parameters))}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
