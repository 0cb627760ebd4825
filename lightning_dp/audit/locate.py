"""The user's line behind a difference, or as near to it as can be said."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from lightning_dp.audit.hidden_state import source_of
from lightning_dp.audit.neighbour import ChosenRecords
from lightning_dp.audit.sketch import leaves, row
from lightning_dp.engines.user_code import Line, is_users
from lightning_dp.lightning_internals import overridden
from lightning_dp.loading.reading import read
from lightning_dp.mechanism.seeded_globals import seed_torch

SET_UP = ("__init__", "setup", "configure_model", "configure_optimizers")
"""Functions that make an attribute; a line in another one changes it."""

TRANSFER_HOOKS = (
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "on_train_batch_start",
)


def line_that_names(owners: list[Any], name: str) -> Line | None:
    """The first line of the users' classes that seems to change what a state is called by, else the first that names it.

    Args:
        owners: objects, of whose classes the sources are read.
        name: as in ``"self.net.center[0]"`` or ``"state_dict.proto"``.
    """
    words = [word for word in re.split(r"[.\[\] ()]+", name) if word.isidentifier() and word != "self"]
    lines = [
        line for owner in owners for kind in type(owner).__mro__ if is_users(source_of(kind)) for line in _lines(kind)
    ]
    for word in reversed(words):
        changes = re.compile(
            rf"\b{word}\b(\[[^=]*\]|\.data|\.grad)*\s*([-+*/@|&]|//|\*\*)?=(?!=)|\b{word}\b[\w.\[\]()*, ]*\.\w*_\("
            rf"|\b{word}\b(\[.*?\])*\.(append|appendleft|add|update|extend|insert|pop|clear|setdefault)\(|update_parameters|{word}\b.*numpy\(\)"
        )
        names = re.compile(rf"\b{word}\b")
        for wanted in (changes, names):
            for line, text in lines:
                if line.function.rpartition(".")[2] not in SET_UP and wanted.search(text):
                    return line
    return None


def _lines(kind: type) -> Iterator[tuple[Line, str]]:
    for value in vars(kind).values():
        function = inspect.unwrap(getattr(value, "__func__", value))
        if not inspect.isfunction(function):
            continue
        try:
            text, first = inspect.getsourcelines(function)
        except (OSError, TypeError):
            continue
        for number, one in enumerate(text, start=first):
            if not one.strip().startswith(("#", "def ", "@")):
                yield Line(function.__code__.co_filename, number, function.__qualname__), one


def line_of(function: Any) -> Line | None:
    """Where a function, method or callable object is written, if the user has written it."""
    found = function if inspect.isroutine(function) else vars(type(function)).get("__call__")
    found = inspect.unwrap(getattr(found, "__func__", found)) if found is not None else None
    code = getattr(found, "__code__", None)
    if code is None or not is_users(code.co_filename):
        return None
    return Line(
        code.co_filename, code.co_firstlineno, code.co_qualname if hasattr(code, "co_qualname") else code.co_name
    )


def stage_of_input(
    mine: ChosenRecords,
    theirs: ChosenRecords,
    collate: Callable[[Any], Any],
    place: int,
    module: pl.LightningModule,
    data: Any,
) -> tuple[str, Line | None]:
    """Which of data set, ``collate_fn`` and hooks gives one example another input when another example is away.

    They are run once more, on the chosen records in one batch.

    Returns:
        What it is, in words, and its line.
    """
    read_before, made_before = _made(mine, collate, place)
    read_after, made_after = _made(theirs, collate, place)
    dataset = mine.dataset
    if read_before != read_after:
        several = getattr(dataset, "__getitems__", None)
        line = line_of(several) if several is not None else None
        line = line or line_of(getattr(dataset, "__getitem__", None))
        return (
            f"the data set {type(dataset).__name__}, by random numbers that examples share or by reading several at once",
            line,
        )
    if made_before != made_after:
        return "collate_fn", line_of(collate)
    for owner in (module, data):
        for hook in TRANSFER_HOOKS:
            if owner is not None and hasattr(owner, hook) and overridden(hook, owner):
                return f"{type(owner).__name__}.{hook}", line_of(getattr(owner, hook))
    if collate is not default_collate and (line := line_of(collate)) is not None:
        return "collate_fn, or a hook on the way to the device", line
    return "the data set, collate_fn or a hook on the way to the device", line_of(getattr(dataset, "__getitem__", None))


def _made(dataset: ChosenRecords, collate: Callable[[Any], Any], place: int) -> tuple[Any, Any]:
    """What is read for an example, and its part of the batch, as texts that can be compared."""
    places = [one for one in range(len(dataset)) if one not in dataset.absent]
    at = places.index(place)
    with isolate_rng():
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 (the generator that old code draws from)
        seed_torch(0)
        records = read(dataset, places)
        batch = collate(records)
    one = (
        records[at] if isinstance(records, list) else pytree.tree_map(lambda part: _row(part, at, len(places)), records)
    )
    return _text(one), _text(pytree.tree_map(lambda part: _row(part, at, len(places)), batch))


def _row(part: Any, at: int, rows: int) -> Any:
    return part[at] if isinstance(part, (Tensor, np.ndarray)) and part.ndim > 0 and len(part) == rows else part


def _text(nest: Any) -> str:
    found = [
        (name, one.form, None if one.values is None else one.values.tolist()) for name, one in leaves(nest).items()
    ]
    return repr(found or row(nest))


def owners_of(module: nn.Module, trainer: pl.Trainer, data: Any) -> list[Any]:
    """Objects whose code runs in a fit: the module and those in it, callbacks, the data module, optimizers' classes."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set where type checkers do not see it
    return [*module.modules(), *callbacks, *([] if data is None else [data])]
