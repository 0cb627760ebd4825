"""A few named facts for people, on the screen together: what a run is about to do, and what it has done."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import StringIO
from typing import TextIO

from lightning.fabric.utilities.rank_zero import rank_zero_module
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

NARROWEST = 60
"""Columns of a terminal below which a frame leaves too little room."""


@rank_zero_only
def show(title: str, rows: Mapping[str, str]) -> None:
    """Show one panel, as one record at INFO of Lightning's logger: whoever silences that, silences it.

    Where the logger writes to a terminal and rich is installed, it has a frame and is wrapped; elsewhere each row is a line.
    Only rank zero shows it.

    Args:
        title: what the panel is about.
        rows: name → fact. Rows that are empty are left out.
    """
    shown = {name: fact for name, fact in rows.items() if fact}
    terminal = next((stream for stream in map(_stream, _handlers()) if _is_wide_terminal(stream)), None)
    text = plain(title, shown)
    if terminal is not None:
        with suppress(Exception):  # of whatever rich is installed: a frame is never in the way of training
            text = framed(title, shown, _columns(terminal))
    with _above_the_bar():
        rank_zero_info(text)


def plain(title: str, rows: Mapping[str, str]) -> str:
    """One line for each row.

    Example:
        >>> print(plain("Differential privacy", {"steps": "120", "protected": "one example"}))
        Differential privacy
          steps      120
          protected  one example
    """
    width = max(map(len, rows), default=0)
    named = ((name if first else "", line) for name, fact in rows.items() for first, line in _lines(fact))
    return "\n".join([title, *(f"  {name:<{width}}  {line}" for name, line in named)])


def framed(title: str, rows: Mapping[str, str], columns: int) -> str:
    """The same in a frame that is ``columns`` wide, without colours or control characters. It needs rich."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, fact in rows.items():
        table.add_row(Text(name), Text(fact))
    console = Console(file=StringIO(), width=columns, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as captured:
        console.print(Text(title))
        console.print(Panel(table))
    return "\n" + captured.get().rstrip("\n")  # a bar may stand at the beginning of the line


def _lines(fact: str) -> Iterator[tuple[bool, str]]:
    for at, line in enumerate(fact.splitlines()):
        yield at == 0, line


def _handlers() -> Iterator[logging.Handler]:
    """Those that hear what Lightning says."""
    logger: logging.Logger | None = rank_zero_module.log
    while logger is not None:
        yield from logger.handlers
        logger = logger.parent if logger.propagate else None


def _stream(handler: logging.Handler) -> TextIO | None:
    return handler.stream if isinstance(handler, logging.StreamHandler) else None


def _is_wide_terminal(stream: TextIO | None) -> bool:
    if stream is None or find_spec("rich") is None:
        return False
    try:
        return stream.isatty() and "utf" in (stream.encoding or "").lower() and _columns(stream) >= NARROWEST
    except (AttributeError, OSError, ValueError):  # closed, or somebody's own
        return False


def _columns(stream: TextIO) -> int:
    from rich.console import Console

    return min(Console(file=stream).width, 120)


@contextmanager
def _above_the_bar() -> Iterator[None]:
    """Write above rich's progress bar while it moves.

    The bar has put a stream in the place of ``sys.stderr`` that does so, but a handler has kept the one that it was made with.
    """
    taken = getattr(sys.stderr, "rich_proxied_file", None)
    moved = [
        handler
        for handler in _handlers()
        if taken is not None and isinstance(handler, logging.StreamHandler) and handler.stream is taken
    ]
    for handler in moved:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in moved:
            handler.setStream(taken)
