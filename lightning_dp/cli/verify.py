"""``lightning-dp verify --config RECIPE``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lightning_dp.audit.verification import verify
from lightning_dp.cli.recipe_files import expanded
from lightning_dp.cli.recipes import RecipeCLI, command_line
from lightning_dp.errors import PreflightError
from lightning_dp.strategy import register_strategies

_OVERRIDES = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


def run(words: Sequence[str]) -> None:
    """Verify a recipe and print what was found; ends the process with 1 if something is wrong.

    Args:
        words: the command line after ``verify``; what is not an option of the command overrides the recipe's settings.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dp verify",
        description="Train a recipe for a few steps on a few examples, and again without one of them, given the same releases, "
        "and say what differs. Nothing may.",
        epilog="Further options are the recipe's own, as in --trainer.precision=32-true.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--recipe", metavar="NAME", help="a recipe by name, with DifferentialPrivacy in it")
    which.add_argument("--config", metavar="FILE", help="one of your own")
    parser.add_argument("--steps", type=int, default=5, metavar="T", help="of each replay, default 5")
    parser.add_argument("--examples", type=int, default=24, metavar="N", help="4 to 64, default 24")
    parser.add_argument(
        "--remove", type=int, metavar="INDEX", help="the one example to be taken away; default: up to three"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the replays' random numbers, default 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of sentences")
    args, rest = parser.parse_known_args(list(words))
    recipe = ["--config", args.config] if args.recipe is None else ["--recipe", args.recipe]
    expanded(recipe)  # a missing file is said first
    with tempfile.TemporaryDirectory() as scratch, command_line([]):
        register_strategies()
        cli = RecipeCLI(
            args=[*recipe, *_OVERRIDES, f"--trainer.default_root_dir={scratch}", *rest],
            run=False,
            save_config_callback=None,
        )
        try:
            options = {"steps": args.steps, "examples": args.examples, "remove": args.remove, "seed": args.seed}
            result = verify(cli.trainer, cli.model, cli.datamodule, **options)
        except PreflightError as error:
            _say(f"refused: {error}")
            sys.exit(1)
        except ValueError as error:
            parser.error(str(error))
    _say(json.dumps(result.to_dict(), ensure_ascii=False) if args.json else str(result))
    if not result.ok:
        sys.exit(1)


@rank_zero_only
def _say(text: str) -> None:
    print(text, flush=True)
