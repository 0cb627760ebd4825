"""LightningCLI for recipes: ``lightning-dp fit|validate|test|predict --recipe NAME`` or ``--config recipe.yaml``."""

from __future__ import annotations

import logging
import sys
import warnings
from argparse import SUPPRESS
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from lightning_dp import errors
from lightning_dp.cli.recipe_files import expanded, fail
from lightning_dp.cli.recipe_parser import RecipeParser, said
from lightning_dp.cli.seeds import is_waited_for, left_by
from lightning_dp.strategy import register_strategies


class RecipeCLI(LightningCLI):
    """LightningCLI that knows the private strategies and ends ``fit`` with the last validation metrics."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add ``--simulate`` and ``--matmul_precision``, and the options that :meth:`parse_arguments` reads."""
        parser.add_argument(
            "--simulate",
            type=PositiveInt,
            default=1,
            metavar="S",
            help="run the recipe at 1/S of its batch and noise, for choosing settings: NOT PRIVATE as the recipe says",
        )
        parser.add_argument("--bases", type=list[str] | None, default=None, help=SUPPRESS)
        parser.add_argument("--recipe", metavar="NAME", help="a recipe by name; `lightning-dp recipes` lists them")
        parser.add_argument(
            "--matmul_precision",
            type=Literal["highest", "high", "medium"] | None,
            default=None,
            help="set_float32_matmul_precision on a GPU: with 'high' the network may use TF32; norms, sums, noise never do",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the command line with recipes found by name, and files laid on their bases."""
        if args is None or (isinstance(args, list) and all(isinstance(word, str) for word in args)):
            args = expanded(sys.argv[1:] if args is None else args)
            self.config = parser.parse_args(args)
        else:
            super().parse_arguments(parser, args)

    def before_instantiate_classes(self) -> None:
        """Hand ``--simulate`` to the recipe's DifferentialPrivacy, and say it in the names of the logs; set the precision."""
        config = self.config if self.subcommand is None else self.config[self.subcommand]
        config.bases = None  # what is saved beside the logs is whole
        if config.matmul_precision is not None and torch.cuda.is_available():
            torch.set_float32_matmul_precision(config.matmul_precision)
        if config.simulate > 1:
            simulate_recipe(config, int(config.simulate))

    def instantiate_classes(self) -> None:
        """Make Trainer, module and data; a value that one of them does not take ends the command with a sentence."""
        try:
            super().instantiate_classes()
        except (ValueError, OSError) as error:
            if self.parser_class is not RecipeParser or not _is_about_a_value(error):
                raise
            fail(" ".join(said(str(error)).split()))

    def after_fit(self) -> None:
        """Print what the last validation said, on rank 0."""
        metrics = {name: value for name, value in self.trainer.callback_metrics.items() if name.startswith("val")}
        if metrics and self.trainer.is_global_zero:
            values = ", ".join(f"{name} = {float(value):.4f}" for name, value in sorted(metrics.items()))
            print(f"Last validation, after {self.trainer.global_step} steps: {values}")
        if self.trainer.is_global_zero and is_waited_for():
            trainer: Any = self.trainer
            private = [
                c for c in trainer.callbacks if any(k.__name__ == "DifferentialPrivacy" for k in type(c).__mro__)
            ]
            numbers = {name: float(value) for name, value in sorted(metrics.items())}
            left_by(numbers, private[0].statement().to_dict() if private else None)


def _is_about_a_value(error: BaseException) -> bool:
    """Whether it was raised by this package's own code, or by jsonargparse when it had tried what it was given."""
    while error.__cause__ is not None:
        error = error.__cause__
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    return isinstance(error, (ValueError, OSError)) and module.split(".")[0] in ("lightning_dp", "jsonargparse")


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
        words: the command and its options, as in ``["fit", "--recipe", "digits/cnn_eps8"]``.
    """
    register_strategies()
    with command_line(words), _quiet():
        try:
            RecipeCLI(save_config_kwargs={"overwrite": True}, parser_class=RecipeParser)
        except errors.MissingExtraError as error:
            fail(str(error))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's advertisements, and without warnings about Lightning's own code that no user can heed."""

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("💡 Tip")

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(wanted)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`isinstance\\(treespec, LeafSpec\\)` is deprecated")
            yield
    finally:
        log.removeFilter(wanted)


@contextmanager
def command_line(words: Sequence[str]) -> Iterator[None]:
    """While it lasts these are the process's words: LightningCLI reads them, and ranks that Lightning starts repeat them."""
    before = sys.argv
    sys.argv = [before[0] if before else "lightning-dp", *words]
    try:
        yield
    finally:
        sys.argv = before
