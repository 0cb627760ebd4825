"""LightningCLI for recipes: ``lightning-dp fit|validate|test|predict --config recipe.yaml``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_dp.strategy import register_strategies


class RecipeCLI(LightningCLI):
    """LightningCLI that knows the private strategies and ends ``fit`` with the last validation metrics."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--simulate``."""
        parser.add_argument(
            "--simulate",
            type=PositiveInt,
            default=1,
            metavar="S",
            help="run the recipe at 1/S of its batch and noise, for choosing settings: NOT PRIVATE as the recipe says",
        )

    def before_instantiate_classes(self) -> None:
        """Hand ``--simulate`` to the recipe's DifferentialPrivacy, and say it in the names of the logs."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        if config.simulate > 1:
            simulate_recipe(config, int(config.simulate))

    def after_fit(self) -> None:
        """Print what the last validation said, on rank 0."""
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val")}
        if metrics and self.trainer.is_global_zero:
            values = ", ".join(f"{name} = {float(value):.4f}" for name, value in sorted(metrics.items()))
            print(f"Last validation, after {self.trainer.global_step} steps: {values}")


def simulate_recipe(config: Namespace, simulate: int) -> None:
    """Make a simulation of a recipe, in its parsed configuration.

    Args:
        config: of the recipe, changed in place: the callback's ``simulate`` and the loggers' ``name``.
        simulate: S, see :mod:`lightning_dp.plan.simulation`.

    Raises:
        SystemExit: the recipe has no ``DifferentialPrivacy``.
    """
    found = [c for c in config.trainer.callbacks or [] if c.class_path.split(".")[-1] == "DifferentialPrivacy"]
    if not found:
        raise SystemExit(
            f"--simulate {simulate}: expected a recipe with DifferentialPrivacy among its callbacks. What is not private needs "
            "no simulation: give it a smaller batch."
        )
    for callback in found:
        callback.init_args["simulate"] = simulate
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    for logger in loggers:
        arguments = getattr(logger, "init_args", None)
        if arguments is not None and isinstance(arguments.get("name"), str):
            arguments["name"] += f"_simulated_{simulate}"


def run(words: Sequence[str]) -> None:
    """Run one of LightningCLI's commands.

    Args:
        words: the command and its options, as in ``["fit", "--config", "recipes/digits/cnn_eps8.yaml"]``.
    """
    register_strategies()
    with command_line(words):
        RecipeCLI(save_config_kwargs={"overwrite": True})


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """While it lasts these are the process's words: LightningCLI reads them, and ranks that Lightning starts repeat them."""
    before = sys.argv
    sys.argv = [before[0] if before else "lightning-dp", *words]
    try:
        yield
    finally:
        sys.argv = before
