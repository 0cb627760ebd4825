"""A check that adapters were trained, and that merging them changes the model."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_dp.validate import whole

HALF = 0.5
"""The least share of an adapter that has to be left in the merged weight: what is smaller than a rounding is lost."""


class AdaptersError(RuntimeError):
    """A run after which trainable parameters are what they were, or adapters that change nothing."""


class AdaptersMoved(pl.Callback):
    """Ends a run whose adapters do not learn, early and once more at the end of ``fit``.

    Checked are three things, each of which has cost people a training run (adapters that no optimizer had, hooks that never
    ran, a merged model that was the base):

    - every trainable parameter has another value than when ``fit`` began;
    - the product B·A of every LoRA adapter is finite and not zero;
    - more than half of (α/r)·B·A is left in W + (α/r)·B·A, in the type in which W is kept: bfloat16 loses small ones.

    It reads weights alone, which a private run releases at every step, so it costs no privacy. Under privacy noise moves what
    the optimizer has, so this cannot see a parameter without a gradient: the warning about parameters that "got no gradient
    from any example", which ``DifferentialPrivacy`` gives by itself, is for those.

    A fit that takes no step is not judged. The beginning's values of what is trained are kept on the CPU meanwhile.

    Args:
        early: the step after which the parameters are looked at for the first time.

    Raises:
        ValueError: ``early`` is no whole number above 0.
        AdaptersError: in ``fit``, naming the parameters. What was trained stays in the module.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[AdaptersMoved()], logger=False)
    """

    def __init__(self, early: int = 10) -> None:
        self.early = whole("early", early, low=1)
        self._before: dict[str, Tensor] = {}
        self._first = 0

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = trainer.global_step
        self._before = {name: p.detach().to("cpu", copy=True) for name, p in _trained(pl_module).items()}

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._first == self.early:
            self._check_moved(pl_module, trainer.global_step - self._first)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        steps = trainer.global_step - self._first
        if steps:
            self._check_moved(pl_module, steps)
            _check_merged(pl_module)
        self._before = {}

    def _check_moved(self, module: nn.Module, steps: int) -> None:
        now = _trained(module)
        still = [
            name for name, value in self._before.items() if name in now and torch.equal(now[name].detach().cpu(), value)
        ]
        if still or not self._before:
            raise AdaptersError(
                f"{_some(still) or 'no parameter'} of {len(self._before)} trainable parameters: expected all to have moved "
                f"after {steps} steps. Give the optimizer every parameter with requires_grad, a rate above 0, and an early=... "
                "beyond a warm-up that begins at 0."
            )


def _check_merged(module: nn.Module) -> None:
    """The second and the third of what :class:`AdaptersMoved` checks."""
    shares: list[float] = []
    for name, layer in module.named_modules():
        if not (hasattr(layer, "lora_A") and hasattr(layer, "get_delta_weight")):
            continue
        for adapter in layer.active_adapters:
            if adapter not in layer.lora_A:
                continue
            weight = layer.get_base_layer().weight.detach()
            added = layer.get_delta_weight(adapter).detach()
            share = float(added.float().norm() / weight.float().norm().clamp(min=torch.finfo(torch.float32).tiny))
            if not 0 < share < float("inf"):
                raise AdaptersError(
                    f"{name}: the adapter {adapter!r} adds {share} of its weight: expected a share above 0 and finite. Lower "
                    "the learning rate, or look for what resets its B."
                )
            if weight.is_floating_point():
                merged = (weight + added.to(weight.dtype)).double() - weight.double()
                left = float((merged * added).sum() / added.double().square().sum())
                if left < HALF:
                    raise AdaptersError(
                        f"{name}: merged in {weight.dtype}, {left:.0%} of the adapter {adapter!r} is left (it adds {share:.1e} "
                        "of the weight): expected more than half of it. Merge in float32, or keep the adapters apart."
                    )
            shares.append(share)
    if shares:
        rank_zero_info(
            f"AdaptersMoved: {len(shares)} adapters add {min(shares):.2g} to {max(shares):.2g} of the weight they adapt."
        )


def _trained(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{', '.join(names[:4])}{more}" if names else ""
