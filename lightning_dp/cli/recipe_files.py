"""Recipes as files: where they are, by name, what each is laid on, and what that makes of a command line.

A recipe is a YAML file for LightningCLI. Its key ``bases`` lists the files that it is laid on, first the lowest, as paths from
its own folder; a base may have bases. So ``--config`` needs the recipe alone.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

_CHECKPOINTS = ("best", "last", "hpc", "registry", "null", "")
"""Words for a checkpoint that Lightning looks for by itself."""

_PARTS = ("shared", "launch")
"""Folders of files that are no recipe by themselves."""


def folder() -> Path:
    """Where recipes are: inside the installed package, or beside it in a clone."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """The names of all recipes, as ``cifar10/wrn_16_4_eps8``."""
    found = (path.relative_to(folder()) for path in folder().glob("*/*.yaml"))
    return sorted(path.with_suffix("").as_posix() for path in found if path.parts[0] not in _PARTS)


def find(name: str) -> Path:
    """The file of a recipe.

    Args:
        name: as :func:`names` has it; ``.yaml`` may follow.

    Raises:
        SystemExit: there is none of that name (exit code 2).
    """
    known = names()
    plain = name.removesuffix(".yaml").removeprefix("recipes/")
    if plain not in known:
        fail(f"recipe {name!r}: there is none of that name.{alike(plain, known)} `lightning-dp recipes` lists all.")
    return folder() / f"{plain}.yaml"


def about(name: str) -> str:
    """What the first line of a recipe says."""
    return find(name).read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("#").strip()


def layers(path: Path) -> list[Path]:
    """The files that a recipe is made of, in the order in which they are laid on one another; itself is the last.

    Raises:
        SystemExit: a file is missing or no YAML, or is among its own bases (exit code 2).
    """
    return list(dict.fromkeys(_layers(path, ())))


def expanded(words: Sequence[str]) -> list[str]:
    """A command line for LightningCLI, of one that may name recipes.

    ``--recipe NAME`` becomes the ``--config`` of its file, a ``--config`` has those of its bases before it, and ``--data DIR``
    becomes ``--data.init_args.root``.

    Args:
        words: the command line after the program's name.

    Raises:
        SystemExit: a recipe, a file or a base is missing (exit code 2).
    """
    found: list[str] = []
    left = iter(_with_nulls(words))
    for word in left:
        option, equals, value = word.partition("=")
        if option not in ("--recipe", "--config", "-c", "--data", "--ckpt_path"):
            found.append(word)
            continue

        value = value if equals else next(left, "")
        if option == "--ckpt_path":
            if value not in _CHECKPOINTS and "://" not in value and not Path(value).exists():
                fail(f"--ckpt_path {value}: expected a checkpoint that is there.")
            found += [option, value]
        elif option == "--data":
            is_folder = Path(value).expanduser().exists() and Path(value).suffix not in (".yaml", ".yml", ".json")
            found += ["--data.init_args.root" if is_folder else option, value]
        elif option == "--recipe":
            found += _configs(find(value))
        elif "\n" in value or ": " in value or value in ("", "null"):  # the text of a configuration, not a file's name
            found += [option, value]
        else:
            found += _configs(Path(value).expanduser())
    return found


def copy(name: str, target: Path) -> list[Path]:
    """Copy a recipe and its bases into a folder of your own, to be changed there.

    Args:
        name: of the recipe.
        target: the folder; it is made if need be. Files keep their places relative to each other.

    Returns:
        What was written; the recipe is the last.

    Raises:
        SystemExit: a file is there already with other contents (exit code 2).
    """
    pairs = [(path, target / path.relative_to(folder())) for path in layers(find(name))]
    for path, new in pairs:
        if new.exists() and new.read_bytes() != path.read_bytes():
            fail(f"{new} is there already and differs: expected a folder without it. Name another folder.")
    for path, new in pairs:
        new.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, new)
    return [new for _, new in pairs]


def alike(word: str, known: Sequence[str]) -> str:
    """A sentence with the names that ``word`` may be a slip of, or none."""
    close = get_close_matches(word, sorted(set(known)), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def fail(message: str) -> NoReturn:
    """End the command as one that was typed wrong: a sentence on the error stream, exit code 2."""
    print(f"lightning-dp: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _with_nulls(words: Sequence[str]) -> list[str]:
    """The words with a ``null`` for an argument inside an argument as the text of a configuration.

    jsonargparse hands such a value down as a word once more, and ``None`` is then the string of these four letters.
    """
    found: list[str] = []
    for word in words:
        option, equals, value = word.partition("=")
        if not equals and word == "null" and found:
            option, value = found[-1], word
        if value != "null" or option.count(".init_args.") < 2 or option.startswith("--trainer.callbacks"):
            found.append(word)
            continue
        del found[len(found) - (not equals) :]
        content: Any = None
        for key in reversed(option.removeprefix("--").split(".")):
            content = {key: content}
        found += ["--config", json.dumps(content)]
    return found


def _configs(path: Path) -> list[str]:
    return [word for layer in layers(path) for word in ("--config", str(layer))]


def _layers(path: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    for base in _bases(path):
        if base in (*above, path):
            fail(f"{path}: expected bases that are not laid on it in turn; {base} is.")
        yield from _layers(base, (*above, path))
    yield path


def _bases(path: Path) -> list[Path]:
    bases = _read(path).get("bases") or []
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        fail(f"{path}: bases={bases!r}: expected a list of files, as paths from the folder of this one.")
    return [_plain(path.parent / base) for base in bases]


def _plain(path: Path) -> Path:
    """Without ``..`` inside, and otherwise as it was given."""
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] not in ("..", path.anchor):
            parts.pop()
        else:
            parts.append(part)
    return Path(*parts)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        known = names()
        plain = path.as_posix().removesuffix(".yaml").removeprefix("recipes/")
        hint = f" The recipe of that name is `--recipe {plain}`." if plain in known else alike(plain, known)
        fail(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}).{hint}")
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        fail(f"{path}: no YAML: {' '.join(str(error).split())}")
    if not isinstance(content, dict):
        fail(f"{path}: expected a YAML file of settings, such as `trainer:` and what belongs to it.")
    return content
