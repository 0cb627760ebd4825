"""``lightning-dp recipes``: which there are, one of them in full, or a copy to change."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_dp.cli.recipe_files import about, copy, find, folder, layers, names


def run(words: Sequence[str]) -> None:
    """List recipes, show one, or copy one.

    Args:
        words: the command line after ``recipes``.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dp recipes",
        description="The recipes that come with the package. Without a command: list them.",
        epilog="lightning-dp fit --recipe NAME trains one.",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    listed = commands.add_parser("list", help="the names, and what each is")
    listed.add_argument("filter", nargs="?", default="", metavar="TEXT", help="only names in which this text occurs")
    show = commands.add_parser("show", help="the files of a recipe, as they are laid on one another")
    show.add_argument("name", metavar="NAME")
    copied = commands.add_parser("copy", help="a copy with all its files, to be changed")
    copied.add_argument("name", metavar="NAME")
    copied.add_argument("folder", nargs="?", type=Path, default=Path("recipes"), help="where to; default: recipes")
    args = parser.parse_args(list(words))
    if args.command == "show":
        for path in layers(find(args.name)):
            print(f"# ---- {path.relative_to(folder()).as_posix()}\n")
            print(path.read_text(encoding="utf-8"))
    elif args.command == "copy":
        written = copy(args.name, args.folder)
        print("\n".join(f"wrote {path}" for path in written))
        print(f"\nlightning-dp fit --config {written[-1]}")
    else:
        found = [name for name in names() if getattr(args, "filter", "") in name]
        width = max((len(name) for name in found), default=0)
        for name in found:
            print(f"{name:{width}}  {about(name)}")
