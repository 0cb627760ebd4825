"""``lightning-dp audit --config RECIPE``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from lightning_dp.audit.result import VIOLATED
from lightning_dp.audit.run import audit, check_options
from lightning_dp.cli.recipe_files import expanded
from lightning_dp.cli.recipes import RecipeCLI, command_line
from lightning_dp.strategy import register_strategies

_OVERRIDES = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
)


def run(words: Sequence[str]) -> None:
    """Audit a recipe and print the verdict; ends the process with 1 if the claim is violated.

    Args:
        words: the command line after ``audit``; what is not an option of the audit overrides the recipe's settings.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dp audit",
        description="Train a recipe once with canaries and print a lower bound on ε beside the claimed upper bound.",
        epilog="Further options are the recipe's own, as in --trainer.max_steps=50.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", metavar="NAME", help="a recipe by name, with DifferentialPrivacy in it")
    which.add_argument("--config", metavar="FILE", help="one of your own")
    parser.add_argument("--gradient-canaries", type=int, default=5000, metavar="M", help="default 5000")
    parser.add_argument("--input-canaries", type=int, default=200, metavar="M", help="default 200")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="default 0.95")
    parser.add_argument("--seed", type=int, help="of the canaries' coins; default: secret")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a sentence")
    args, rest = parser.parse_known_args(list(words))
    try:  # before the recipe, which takes its time
        check_options(args.gradient_canaries, args.input_canaries, args.confidence, args.seed)
    except ValueError as error:
        parser.error(str(error))
    recipe = ["--config", args.config] if args.recipe is None else ["--recipe", args.recipe]
    expanded(recipe)  # a missing file is said first
    with tempfile.TemporaryDirectory() as scratch, command_line([]), _quiet(args.json):
        register_strategies()
        cli = RecipeCLI(
            args=[*recipe, *_OVERRIDES, f"--trainer.default_root_dir={scratch}", *rest],
            run=False,
            save_config_callback=None,
        )
        try:
            result = audit(
                cli.trainer,
                cli.model,
                datamodule=cli.datamodule,
                gradient_canaries=args.gradient_canaries,
                input_canaries=args.input_canaries,
                confidence=args.confidence,
                seed=args.seed,
            )
        except ValueError as error:
            parser.error(str(error))
    print(json.dumps(result.to_dict(), ensure_ascii=False) if args.json else result)
    if result.verdict == VIOLATED:
        sys.exit(1)


@contextmanager
def _quiet(wanted: bool) -> Iterator[None]:
    """Without Lightning's announcements, which would stand beside the JSON."""
    told = logging.getLogger("lightning.pytorch")
    before = told.level
    if wanted:
        told.setLevel(logging.WARNING)
    try:
        yield
    finally:
        told.setLevel(before)
