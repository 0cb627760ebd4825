"""Which optimizers are said to be public, and whether that can be."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl
from torch.optim import Optimizer

from lightning_dp.errors import PreflightError


def check_public_optimizers(module: pl.LightningModule, optimizers: Sequence[Optimizer], public: Sequence[int]) -> None:
    """Refuse a choice of public optimizers that says nothing, or that lets two kinds of steps move one parameter.

    Args:
        module: whose ``automatic_optimization`` decides whether there is a choice.
        optimizers: in the order of ``configure_optimizers``.
        public: the places said to be public.

    Raises:
        PreflightError: see the message.
    """
    if not public:
        return
    if module.automatic_optimization:
        raise PreflightError(
            f"public_optimizers={list(public)} with automatic optimization: expected None. Its one optimizer is the private "
            "one. Several optimizers need automatic_optimization=False in the module."
        )
    strangers = [place for place in public if not 0 <= place < len(optimizers)]
    if strangers or set(public) >= set(range(len(optimizers))):
        raise PreflightError(
            f"public_optimizers={list(public)} with {len(optimizers)} optimizers: expected some places from 0 to "
            f"{len(optimizers) - 1}, and at least one optimizer left that is private. Name those only whose loss does not "
            "read the batch; to train on public data alone, leave the callback out."
        )
    names = {id(p): name for name, p in module.named_parameters()}
    held = [{id(p) for group in one.param_groups for p in group["params"]} for one in optimizers]
    private = set().union(*(ids for place, ids in enumerate(held) if place not in public))
    shared = sorted(names.get(p, "?") for p in set().union(*(held[place] for place in public)) & private)
    if shared:
        raise PreflightError(
            f"parameters {', '.join(shared[:5])} belong to a public and to a private optimizer: expected each parameter in "
            "one of them. Give every parameter to one optimizer."
        )
