"""What of the module and its optimizers cannot be private."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import torch

from lightning_dp.engines.user_code import warn_user
from lightning_dp.errors import PreflightError
from lightning_dp.layers.batch_norm import mixes_examples
from lightning_dp.lightning_internals import overridden

CANARIES = "dp_audit_canaries"
"""The name under which an audit adds the coordinates of its gradient-space canaries to the module."""


_TWO_STEPS = (("first_step", "second_step"), ("ascent_step", "descent_step"))
"""What sharpness-aware minimisation (SAM) and its kin call the halves of a step."""


def check_module(module: pl.LightningModule, *, complete: bool = True) -> None:
    """Refuse modules whose layers mix examples or have nothing to train. Called once the module is complete.

    Args:
        module: the user's.
        complete: ``False`` before ``configure_model``, which may be where the parameters come from.

    Raises:
        PreflightError: see the message.
    """
    parameters = inspect.signature(module.training_step).parameters
    if "dataloader_iter" in parameters:
        raise PreflightError(
            "training_step(dataloader_iter): expected training_step(batch, batch_idx). A step that fetches its own "
            "batches cannot be sampled by Poisson. Take the batch as the argument."
        )
    for hook in ("backward",):
        if overridden(hook, module):
            raise PreflightError(
                f"{type(module).__name__}.{hook} is overridden: expected Lightning's own. Per-example gradients are "
                "not taken by a backward pass over the batch, so the override would never run. Remove it."
            )
    mixing = [name for name, layer in module.named_modules() if mixes_examples(layer)]
    if mixing:
        raise PreflightError(
            f"BatchNorm in {', '.join(mixing)}: expected layers that treat every example on its own. Batch statistics let "
            "one example change every other's gradient, so clipping bounds nothing. Replace them by GroupNorm with "
            "lightning_dp.make_trainable_privately(module) before fit; or, for a frozen pre-trained part, call .eval() and "
            ".requires_grad_(False) on it."
        )
    late = not complete and overridden("configure_model", module)
    if not late and not any(parameter.requires_grad for parameter in module.parameters()):
        raise PreflightError(
            "no trainable parameter: expected at least one with requires_grad=True. Unfreeze what should be trained."
        )


def check_optimizers(module: pl.LightningModule, optimizers: list[torch.optim.Optimizer]) -> None:
    """Refuse optimizers that would step more than once, or outside the reach of the noise.

    Raises:
        PreflightError: see the message.
    """
    if module.automatic_optimization and len(optimizers) != 1:
        raise PreflightError(
            f"{len(optimizers)} optimizers: expected exactly one. Return a single optimizer from configure_optimizers "
            "(it may have several parameter groups)."
        )
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
        raise PreflightError(
            "optimizer=LBFGS: expected one that evaluates its closure once per step. Every further evaluation would be "
            "an unaccounted release. Use SGD or Adam."
        )
    if any(isinstance(optimizer, torch.optim.SparseAdam) for optimizer in optimizers):
        raise PreflightError(
            "optimizer=SparseAdam: expected one that takes dense gradients. Noise falls on every row of an embedding, so a "
            "private gradient is never sparse. Use Adam or AdamW."
        )
    for optimizer in optimizers:
        two = next((pair for pair in _TWO_STEPS if all(hasattr(optimizer, name) for name in pair)), None)
        if two:
            raise PreflightError(
                f"optimizer={type(optimizer).__name__}, which steps in two halves ({two[0]}, {two[1]}): expected one that "
                "needs one gradient a step. Its second gradient, at weights moved by the first, is a further release of the "
                "same sample, not amplified by sampling as if it had a sample of its own. Use SGD or Adam."
            )
    known = {id(parameter) for parameter in module.parameters()}
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    strangers = len(held - known)
    if strangers:
        raise PreflightError(
            f"{strangers} of the optimizer's parameters are not parameters of the module: expected all of them to be. "
            "They would get no private gradient and never move. Register them on the LightningModule."
        )
    idle = [name for name, p in module.named_parameters() if p.requires_grad and id(p) not in held]
    idle = [name for name in idle if not name.startswith(CANARIES)]  # an audit reads their gradients alone
    if idle:
        warn_user(
            f"Trainable parameters that no optimizer holds: {', '.join(idle[:5])}. They count in the clip norm and "
            "never move. Freeze them with requires_grad_(False) or give them to the optimizer."
        )
