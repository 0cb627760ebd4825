"""What a training step may not read: the training data as a whole, and numbers that were logged about them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_dp.engines.user_code import line_of_the_caller
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import connector_of

_PLAIN = (int, float, str, bytes, type(None), tuple)
"""Of a data module, constants such as the number of classes stay readable."""

_LIGHTNINGS = ("lightning", "pytorch_lightning", "lightning_dp")

_AT_FIRST: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
"""What callbacks of the user's held when something was first withheld, which is before the first step."""

_METRICS = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


@contextmanager
def withheld(
    trainer: pl.Trainer,
    loader: Any,
    names: Collection[str] | None = None,
    *,
    shared: Iterable[Any] = (),
    noted: list[str] | None = None,
) -> Iterator[None]:
    """While open, the training data and the numbers logged in training raise at the moment they are read.

    So does, for a step, what callbacks of the user's hold: they may keep private numbers. Constants and methods stay readable.

    Args:
        trainer: of the fit.
        loader: the private training loader.
        names: of the logged numbers that are withheld; ``None``, for a step, withholds all, and what callbacks hold.
        shared: loaders whose data sets stay readable, also where they are a part of the same.
        noted: takes the names of logged numbers that are read, which then do not raise; data are not withheld.

    Raises:
        PreflightError: from whoever reads them, with the line.
    """
    open_ones = {id(part) for one in shared for part in _below(one)}
    data = [one for one in (loader, *_below(loader.dataset)) if id(one) not in open_ones and noted is None]
    data_module = getattr(trainer, "datamodule", None) if noted is None else None
    connector = connector_of(trainer)
    kinds = [(one, type(one), _guarded(cast(Any, type(one)))) for one in data]
    kind, some = cast(Any, type(connector)), None if names is None else frozenset(names)
    kinds.append((connector, kind, _without_metrics(kind, some) if noted is None else _noting(kind, some, noted)))
    if data_module is not None:
        kinds.append((data_module, type(data_module), _constants_only(cast(Any, type(data_module)))))
    if names is None:
        kinds += [(one, type(one), _unchanged_only(cast(Any, type(one)))) for one in _of_the_user(trainer)]
    done: list[tuple[Any, type]] = []
    try:
        for one, kind, guarded in kinds:
            if guarded is not None and not any(one is other for other, _ in done):
                try:
                    object.__setattr__(one, "__class__", guarded)
                except TypeError:  # of a class written in C, such as a list
                    continue
                done.append((one, kind))
        yield
    finally:
        for one, kind in done:
            object.__setattr__(one, "__class__", kind)


def _below(dataset: Any) -> Iterator[Any]:
    """A data set and those that it is made of."""
    yield dataset
    if isinstance(dataset, Subset):
        yield from _below(dataset.dataset)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _below(part)
    elif isinstance(dataset, DataLoader):
        yield from _below(dataset.dataset)


def _of_the_user(trainer: Any) -> Iterator[Any]:
    """Callbacks of the user's."""
    for callback in trainer.callbacks:
        if type(callback).__module__.split(".")[0] not in _LIGHTNINGS:
            _AT_FIRST.setdefault(callback, dict(vars(callback)))
            yield callback


def _refuse(what: str) -> PreflightError:
    line = line_of_the_caller()
    where = "" if line is None else f" ({line})"
    return PreflightError(
        f"a step reads {what}{where}: expected it to read weights and its batch. What it takes from other examples, or from "
        "numbers computed of them, reaches the gradient of each example, and no clip norm bounds that. Let the dataset "
        "bring with each record what it needs, and take constants from public data before training."
    )


def _special(names: tuple[str, ...], what: str) -> dict[str, Any]:
    def refuse(self: Any, *args: Any, **options: Any) -> Any:
        raise _refuse(what)

    return dict.fromkeys(names, refuse)


@cache
def _guarded(kind: type) -> type | None:
    if kind.__module__ == "builtins":
        return None
    what = f"the training data ({kind.__name__})"

    def read(self: Any, name: str) -> Any:
        if name.startswith("__"):
            return object.__getattribute__(self, name)
        raise _refuse(f"{what}.{name}")

    body = _special(("__getitem__", "__len__", "__iter__", "__getattr__"), what)
    return _made(kind, {**body, "__getattribute__": read})


@cache
def _constants_only(kind: type) -> type | None:
    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if name.startswith("__") or isinstance(value, _PLAIN):
            return value
        raise _refuse(f"the data module ({kind.__name__}.{name})")

    return _made(kind, {"__getattribute__": read})


@cache
def _unchanged_only(kind: type) -> type | None:
    def read(self: Any, name: str) -> Any:
        value = object.__getattribute__(self, name)
        held = object.__getattribute__(self, "__dict__")
        if name.startswith("__") or name not in held or callable(value):
            return value
        if isinstance(value, _PLAIN) and value is _AT_FIRST.get(self, {}).get(name, _ABSENT):
            return value
        raise _refuse(f"what a callback keeps ({kind.__name__}.{name})")

    return _made(kind, {"__getattribute__": read})


_ABSENT = object()


@cache
def _without_metrics(kind: type, names: frozenset[str] | None) -> type | None:
    return _noting(kind, names, None)


def _noting(kind: type, names: frozenset[str] | None, noted: list[str] | None) -> type | None:
    def metrics(which: str) -> property:
        plain = getattr(kind, which)

        def read(self: Any) -> Any:
            if names is None:
                raise _refuse(f"trainer.{which}")
            return _Some(which, names, plain.fget(self), noted)

        return property(read)

    return _made(kind, {which: metrics(which) for which in _METRICS})


class _Some(dict[str, Any]):
    """Logged numbers, of which some raise when they are read."""

    def __init__(self, which: str, names: frozenset[str], found: dict[str, Any], noted: list[str] | None) -> None:
        super().__init__(found)
        self._which, self._names, self._noted = which, names, noted

    def _check(self, key: Any) -> None:
        if isinstance(key, str) and (key in self._names or key.rsplit("_", 1)[0] in self._names):
            if self._noted is None:
                raise _refuse(f"trainer.{self._which}[{key!r}]")
            self._noted.append(key)

    def __getitem__(self, key: str) -> Any:
        self._check(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        self._check(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:  # without it, dict(...) would copy and not ask
        return super().__iter__()

    def values(self) -> Any:
        """As of a dict."""
        self._check_all()
        return super().values()

    def items(self) -> Any:
        """As of a dict."""
        self._check_all()
        return super().items()

    def copy(self) -> dict[str, Any]:
        """As of a dict."""
        self._check_all()
        return super().copy()

    def pop(self, key: str, *default: Any) -> Any:
        """As of a dict."""
        self._check(key)
        return super().pop(key, *default)

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def _check_all(self) -> None:
        for key in self:
            self._check(key)


def _made(kind: type, body: dict[str, Any]) -> type | None:
    try:
        return type(kind.__name__, (kind,), {"__slots__": (), "__module__": kind.__module__, **body})
    except TypeError:  # a class that has no subclasses
        return None
