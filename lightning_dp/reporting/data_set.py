"""On which data set a run was trained, as far as its folder says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_dp.reporting.facts import Task

CONFIG = "config.yaml"


def data_set_in(config: str | None) -> str | None:
    """The name of a data set that comes with the package, from a run's ``config.yaml``; ``None`` if that does not say.

    Example:
        >>> data_set_in("data: {class_path: lightning_dp.data.CIFARDataModule, init_args: {name: cifar100}}")
        'cifar100'
        >>> data_set_in("data: {class_path: mine.Images}") is None
        True
    """
    try:
        found = yaml.safe_load(config or "")
    except yaml.YAMLError:
        return None
    named = list(_named(found.get("data") if isinstance(found, dict) else None))
    return named[0] if len(named) == 1 else None


def _named(value: Any) -> Iterator[str]:
    """Of a data module, or of the one that it is around, as ``FixedFeatures`` is."""
    if not isinstance(value, dict):
        return
    kind, given = str(value.get("class_path", "")).rpartition(".")[2], value.get("init_args")
    given = given if isinstance(given, dict) else {}
    if kind == "CIFARDataModule":
        yield str(given.get("name", "cifar10"))
    elif kind == "DigitsDataModule":
        yield "digits"
    else:
        for one in given.values():
            yield from _named(one)


def why_not_beside(name: str, data: str | None, size: int | None, beside: str, task: Task) -> str:
    """Why a run must not be drawn beside a task's published figures; empty if nothing speaks against it.

    Args:
        name: of the run, for the message.
        data: its data set, if that is known.
        size: its N, if that is known.
        beside: the task's name.
        task: whose figures.
    """
    sizes = " or ".join(map(_thousands, task.sizes))
    if data is not None and data != task.data:
        return f"{name} was trained on {data}: expected runs on {task.data} ({sizes} training examples)."
    if data is None and size is not None and size not in task.sizes:
        return (
            f"{name} was trained on {_thousands(size)} examples: expected runs on {task.data}, of which there are {sizes} to "
            "train on."
        )
    return ""


def _thousands(number: int) -> str:
    return f"{number:,}"


def text_of(file: Path) -> str | None:
    """The text of a file, ``None`` if there is none."""
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else None


def short_names(folders: Sequence[Path]) -> list[str]:
    """What tells folders apart, for tables and legends: without the parts that all begin and end with.

    Example:
        >>> short_names([Path("runs/digits/eps2/version_0"), Path("runs/digits/eps8/version_0")])
        ['eps2', 'eps8']
        >>> short_names([Path("runs/digits/eps2/version_0")])
        ['digits/eps2/version_0']
    """
    parts = [folder.parts for folder in folders]
    if len(set(parts)) != len(parts):
        return [str(folder) for folder in folders]
    if len(parts) == 1:
        return ["/".join(parts[0][-3:])]
    shortest = min(map(len, parts))
    front = next((i for i in range(shortest) if len({one[i] for one in parts}) > 1), shortest)
    back = next((i for i in range(shortest - front) if len({one[-1 - i] for one in parts}) > 1), shortest - front)
    found = ["/".join(one[front : len(one) - back]) for one in parts]
    return found if all(found) and len(set(found)) == len(found) else [str(folder) for folder in folders]
