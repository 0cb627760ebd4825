"""LightningCLI for recipes: ``lightning-dp fit|validate|test|predict --config recipe.yaml``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from lightning_dp.strategy import register_strategies


class RecipeCLI(LightningCLI):
    """LightningCLI that knows the private strategies and ends ``fit`` with the last validation metrics."""

    def after_fit(self) -> None:
        """Print what the last validation said, on rank 0."""
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val")}
        if metrics and self.trainer.is_global_zero:
            values = ", ".join(f"{name} = {float(value):.4f}" for name, value in sorted(metrics.items()))
            print(f"Last validation, after {self.trainer.global_step} steps: {values}")


def run(words: Sequence[str]) -> None:
    """Run one of LightningCLI's commands.

    Args:
        words: the command and its options, as in ``["fit", "--config", "recipes/digits/cnn_eps8.yaml"]``.
    """
    register_strategies()
    sys.argv = [sys.argv[0] if sys.argv else "lightning-dp", *words]
    RecipeCLI(save_config_kwargs={"overwrite": True})
