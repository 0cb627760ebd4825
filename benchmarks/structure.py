"""Counts what makes this package hard or easy to change: rooms, floors, arrows, state, and who is handed what.

``uv run python benchmarks/structure.py`` prints one figure a line; ``--names`` also says what was counted. Everything is read
from the source text, nothing is imported or run.

A *room* is a file or a package at the top level of ``lightning_dp``; an *arrow* leads from a room to another that it imports;
the *floors* are the rooms on the longest way along the arrows.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "lightning_dp"
FACES = ("__init__", "__main__")
"""Files that only hand on what others define."""


def files() -> Iterator[tuple[Path, ast.Module]]:
    """Every source file of the package with its syntax tree."""
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text())


def room_of(dotted: str) -> str | None:
    """The room that a module name such as ``lightning_dp.engines.loop`` leads into."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == PACKAGE.name and len(parts) > 1 else None


def arrows() -> dict[str, set[str]]:
    """Room → the rooms it imports."""
    found: dict[str, set[str]] = {}
    for path, tree in files():
        here = path.parts[0].removesuffix(".py")
        if here in FACES:
            continue
        targets = found.setdefault(here, set())
        for node in ast.walk(tree):
            names = [f"{node.module}.{one.name}" for one in node.names] if isinstance(node, ast.ImportFrom) else []
            names += [one.name for one in node.names] if isinstance(node, ast.Import) else []
            targets.update(room for name in names if (room := room_of(name)) and room != here)
    return {room: {target for target in targets if target in found} for room, targets in found.items()}


def floors(imports: dict[str, set[str]]) -> int:
    """The longest chain of rooms, each importing the next."""

    @cache
    def height(room: str) -> int:
        return 1 + max((height(below) for below in imports[room]), default=0)

    return max(map(height, imports))


def attributes(name: str) -> tuple[set[str], set[str]]:
    """The attributes that a class sets on itself, and those that it sets outside its constructor."""
    for _, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                everywhere, later = set(), set()
                for method in node.body:
                    for target in ast.walk(method):
                        if isinstance(target, ast.Attribute) and isinstance(target.ctx, ast.Store):
                            owner = target.value
                            if isinstance(owner, ast.Name) and owner.id == "self":
                                everywhere.add(target.attr)
                                if getattr(method, "name", "") != "__init__":
                                    later.add(target.attr)
                return everywhere, later
    return set(), set()


def arguments(name: str) -> set[str]:
    """The constructor's arguments of a class."""
    for _, tree in files():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == name:
                for method in node.body:
                    if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                        return {one.arg for one in (*method.args.args, *method.args.kwonlyargs)} - {"self"}
    return set()


def takers(parameter: str) -> list[str]:
    """The functions that take a parameter of that name."""
    return [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and parameter in {one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)}
    ]


def tests_of(word: str) -> list[str]:
    """The branches (``if``, conditional expressions, ``match``) whose condition names ``word``."""
    return [
        f"{path}:{node.lineno}"
        for path, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, (ast.If, ast.IfExp))
        and any(
            (isinstance(part, ast.Attribute) and part.attr == word) or (isinstance(part, ast.Name) and part.id == word)
            for part in ast.walk(node.test)
        )
    ]


def calls_of(*names: str) -> list[str]:
    """The calls of functions or methods of these names."""
    return [
        f"{path}:{node.lineno}"
        for path, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (getattr(node.func, "attr", None) in names or getattr(node.func, "id", None) in names)
    ]


def asserts_that_something_is_there() -> list[str]:
    """``assert ... is not None`` everywhere in the package."""
    return [
        f"{path}:{node.lineno}"
        for path, tree in files()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        and isinstance(node.test, ast.Compare)
        and isinstance(node.test.ops[0], ast.IsNot)
        and isinstance(node.test.comparators[0], ast.Constant)
        and node.test.comparators[0].value is None
    ]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", action="store_true", help="also say what was counted")
    names = parser.parse_args().names
    imports = arrows()
    lines = {str(path): len((PACKAGE / path).read_text().splitlines()) for path, _ in files()}
    step, step_later = attributes("PrivateStep")
    callback, _ = attributes("DifferentialPrivacy")
    figures: dict[str, object] = {
        "rooms": sorted(imports),
        "floors": floors(imports),
        "arrows": sorted(f"{room} -> {target}" for room, targets in imports.items() for target in targets),
        "files at the top level": sorted(path.name for path in PACKAGE.glob("*.py")),
        "packages at the top level": sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")),
        "files of more than 400 lines": [f"{path} ({count})" for path, count in lines.items() if count > 400],
        "attributes of PrivateStep": sorted(step),
        "of these set again after construction": sorted(step_later),
        "attributes of DifferentialPrivacy beside its arguments": sorted(callback - arguments("DifferentialPrivacy")),
        "assert ... is not None": asserts_that_something_is_there(),
        "functions that take a strategy": takers("strategy"),
        "files with such functions": sorted({one.split(":")[0] for one in takers("strategy")}),
        "branches on resolution": tests_of("resolution"),
        "getattr and setattr": calls_of("getattr", "setattr"),
    }
    for what, found in figures.items():
        print(f"{what:60s} {found if isinstance(found, int) else len(found)}")
        if names and isinstance(found, list):
            print("\n".join(f"    {one}" for one in found))


if __name__ == "__main__":
    main()
