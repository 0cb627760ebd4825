"""Python attributes that training_step leaves on its module: taken off after each pass, and set once for the whole step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.engines.late import Late
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import KEPT_BY_LIGHTNING, either
from lightning_dp.mechanism.same import same, snapshot

TORCH_KEEPS = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set", "training"})
"""Entries of a module's ``__dict__`` that are torch's: parameters and buffers are watched elsewhere."""

_ABSENT = object()
_CONTAINERS = (list, dict, set, deque)
_KINDS = {int: torch.int64, float: torch.float64}
_written: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
"""What training_step has left on modules: name → what was there before the first private step."""

Place = tuple[str, str, str]
"""A module's path, an attribute's name, and what happened to it: ``"set"``, ``"extended"`` or, where it had another value of
its own before, ``"moved"``."""


@contextmanager
def attributes_put_back(module: nn.Module, *, report: bool = True) -> Iterator[dict[Place, Any]]:
    """Undo, when it closes, every attribute that was set, changed or deleted on ``module`` or a module inside it.

    While it is open, what earlier passes have left looks as it did before training, unless it was found without anybody's
    data: what was learnt from one example may reach another's gradient through released parameters only.

    Args:
        module: the user's.
        report: whether to look at what happened; without it everything is undone and nothing said.

    Yields:
        Filled when it closes: what happened to attributes of LightningModules. What other modules keep for themselves
        (a cache, the last attention map) is undone and not reported.

    Raises:
        PreflightError: a LightningModule's attribute was deleted, or one of its methods, such as a hook, has another function
            in its place: that would be called between steps, with what it knows of an example.
    """
    hidden = [(one, _hide(one)) for one in module.modules() if one in _written]
    before = [(path, one, _snapshot(one)) for path, one in module.named_modules()]
    changes: dict[Place, Any] = {}
    try:
        yield changes
    finally:
        for path, one, found in before:
            if report and isinstance(one, either(pl.LightningModule)):
                changes.update(_changes(path, one, found))
            _put_back(one, found)
        for one, kept in hidden:
            one.__dict__.update(kept)
    for place, value in changes.items():
        if value is _ABSENT:
            raise _adds_up(place)
        if callable(getattr(type(module.get_submodule(place[0])), place[1], None)):
            raise _takes_a_place(place)


def left_on(module: nn.Module) -> Collection[str]:
    """The names of attributes that earlier passes have left on a module, and later ones do not see."""
    return _written.get(module, ())


def hide(owner: nn.Module, name: str) -> None:
    """From here on passes see an attribute as it is now, whatever it becomes; everybody else sees what it is."""
    before = owner.__dict__.get(name, _ABSENT)
    _written.setdefault(owner, {}).setdefault(name, before.copy() if type(before) in _CONTAINERS else before)


@contextmanager
def left_hidden(module: nn.Module) -> Iterator[None]:
    """While open, what passes have left on modules looks as it did before training."""
    kept = [(one, _hide(one)) for one in module.modules() if one in _written]
    try:
        yield
    finally:
        for one, values in kept:
            one.__dict__.update(values)


def leave(
    module: nn.Module,
    changes: dict[Place, Any],
    kinds: dict[Place, Any],
    without_data: Callable[[], dict[Place, Any] | None] = lambda: None,
) -> set[Place]:
    """Do once, for all examples of a step, what each pass through training_step did to attributes.

    A value of Python that every example sets alike may follow from counters alone. It does if training_step sets it so on a
    batch without anybody's data as well; then that batch's value is kept, and later steps may see it. Everything else is
    hidden from them.

    Args:
        module: the user's.
        changes: from :func:`numbers_as_tensors`, each tensor with a leading axis of examples; a late tensor has none.
        kinds: the type of each leaf before that.
        without_data: gives the changes of a pass on a batch without anybody's data, by :func:`values_of_one`, or ``None``
            where there is no such batch. Called if there is something to compare.

    Returns:
        What was found without anybody's data.

    Raises:
        PreflightError: an attribute that had another value before depends on the example, or an integer does. Then nothing is
            done.
    """
    one_for_all = {place: _one_for_all(changes[place], kinds[place]) for place in may_be_public(kinds)}
    found = without_data() if any(value is not _ABSENT for value in one_for_all.values()) else None
    public = {
        place: found[place]
        for place, value in one_for_all.items()
        if found is not None and value is not _ABSENT and place in found and same(found[place], value)
    }
    for place in changes.keys() - public.keys():
        if place[2] == "moved":
            raise _adds_up(place)
        if int in pytree.tree_leaves(kinds[place]) and (
            found is not None or one_for_all.get(place, _ABSENT) is _ABSENT
        ):
            raise PreflightError(
                f"training_step sets self.{_full_name(place)} to different integers for different examples: expected one that "
                "does not depend on the data, such as a counter of steps. Use self.log or a torchmetrics object."
            )
    for place, value in changes.items():
        path, name, how = place
        owner = module.get_submodule(path)
        if place in public:
            _keep(owner, name, how, public[place])
            if how != "extended":  # what else is in a list stays hidden, if it was
                _written.get(owner, {}).pop(name, None)
            continue
        joined = pytree.tree_map(_joined, value, kinds[place])
        before = owner.__dict__.get(name, _ABSENT)
        if int not in pytree.tree_leaves(kinds[place]):
            _written.setdefault(owner, {}).setdefault(name, before.copy() if type(before) in _CONTAINERS else before)
        if how == "set":
            owner.__dict__[name] = joined
        else:
            owner.__dict__[name].extend(joined)
    return set(public)


def keep_public(module: nn.Module, values: dict[Place, Any]) -> None:
    """Set attributes to values that were found without anybody's data, in a step without examples."""
    for (path, name, how), value in values.items():
        _keep(module.get_submodule(path), name, how, value)


def may_be_public(kinds: dict[Place, Any]) -> set[Place]:
    """Changes that may follow from counters alone: to or by values of Python, or from another one that was there."""
    return {
        place
        for place, kind in kinds.items()
        if place[2] == "moved" or not any(issubclass(leaf, Tensor) for leaf in pytree.tree_leaves(kind))
    }


def values_of_one(changes: dict[Place, Any], kinds: dict[Place, Any]) -> dict[Place, Any]:
    """The changes of a single pass, from :func:`numbers_as_tensors`, as values of Python again."""

    def back(leaf: Any, kind: type) -> Any:
        return kind(leaf.item()) if kind in _KINDS and isinstance(leaf, Tensor) else leaf

    return {place: pytree.tree_map(back, value, kinds[place]) for place, value in changes.items()}


def _one_for_all(value: Any, kinds: Any) -> Any:
    """The value that all examples share, or absent."""
    alike = True

    def first(leaf: Any, kind: type) -> Any:
        nonlocal alike
        if not isinstance(leaf, Tensor) or kind is Late:
            return leaf
        alike = alike and all(same(leaf[0], row) for row in leaf[1:])
        return kind(leaf[0].item()) if kind in _KINDS else leaf[0]

    shared = pytree.tree_map(first, value, kinds)
    return shared if alike else _ABSENT


def _keep(owner: nn.Module, name: str, how: str, value: Any) -> None:
    """Set or extend an attribute; of a container that is there already, the content."""
    there = owner.__dict__.get(name, _ABSENT)
    if how == "extended" and isinstance(there, (list, deque)):
        there.extend(value)
        return
    if type(there) is not type(value) or type(there) not in _CONTAINERS:
        owner.__dict__[name] = value
        return
    there.clear()
    if isinstance(there, (dict, set)):
        there.update(value)
    else:
        there.extend(value)


def _full_name(place: Place) -> str:
    return f"{place[0]}.{place[1]}" if place[0] else place[1]


def _adds_up(place: Place) -> PreflightError:
    return PreflightError(
        f"training_step changes self.{_full_name(place)}: expected attributes that are set anew, lists that are appended to, "
        "or values that do not depend on the example. It runs for each example on its own, and what it adds up or moves "
        "cannot be put together afterwards; above all, no later training_step may depend on it. Use self.log or a "
        "torchmetrics object, or do it in on_train_batch_end."
    )


def _takes_a_place(place: Place) -> PreflightError:
    return PreflightError(
        f"training_step puts something in the place of the method self.{_full_name(place)}: expected it to stay. It "
        "would be called between steps with what it knows of an example, and no later training_step may depend on that. "
        "Write the method in the class, and let it read weights, logged metrics and public numbers."
    )


def numbers_as_tensors(changes: dict[Place, Any]) -> dict[Place, Any]:
    """Python numbers become tensors, so that every example's is seen; :func:`leave` turns them back."""

    def as_tensor(leaf: Any) -> Any:
        return torch.tensor(leaf, dtype=_KINDS[type(leaf)]) if type(leaf) in _KINDS else leaf

    return {place: pytree.tree_map(as_tensor, value) for place, value in changes.items()}


def _joined(leaf: Any, kind: type) -> Any:
    """What one example's value becomes for all: scalars the mean, counts the sum, everything else its rows."""
    if not isinstance(leaf, Tensor) or kind is Late:
        return leaf  # a metric's result is one for the whole step
    if kind in _KINDS:
        return int(leaf[0]) if kind is int else float(leaf.mean())
    if leaf.ndim > 1:
        return leaf.flatten(0, 1)
    return leaf.mean() if leaf.is_floating_point() else leaf.sum()


def _changes(path: str, one: pl.LightningModule, found: dict[str, tuple[Any, Any]]) -> dict[Place, Any]:
    changes: dict[Place, Any] = {}
    for name in {*found, *one.__dict__} - KEPT_BY_LIGHTNING - TORCH_KEEPS:
        value, items = found.get(name, (_ABSENT, None))
        now = one.__dict__.get(name, _ABSENT)
        if now is not value:
            if not same(now, value):
                moved = isinstance(value, (float, Tensor)) and now is not _ABSENT
                changes[path, name, "moved" if moved else "set"] = now
        elif items is not None and not _same(items, value):
            before = _as_it_was(items, value)
            if same(before, value):
                continue
            appended = isinstance(value, (list, deque)) and len(value) > len(before)
            if appended and all(same(*pair) for pair in zip(before, value, strict=False)):
                changes[path, name, "extended"] = [*value][len(before) :]
            else:
                changes[path, name, "moved"] = snapshot(value)
    return changes


def _as_it_was(items: Any, value: Any) -> Any:
    """A container like ``value`` with the content in ``items``."""
    if isinstance(value, set):
        return set(items)
    pairs = items.items() if isinstance(value, dict) else enumerate(items)
    kept = {
        key: _as_it_was(inner, item) if type(item) in _CONTAINERS and inner is not item else item
        for key, (item, inner) in pairs
    }
    return kept if isinstance(value, dict) else type(value)(kept.values())


def _hide(one: nn.Module) -> dict[str, Any]:
    """Make what was left on a module look as before training, and give back how it really looks."""
    now, kept = one.__dict__, {}
    for name, before in _written[one].items():
        if name in now:
            kept[name] = now.pop(name)
            if before is not _ABSENT:
                now[name] = before.copy() if type(before) in _CONTAINERS else before
    return kept


def _snapshot(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """The attributes of one module: name → the object, and its items if it is a container."""
    return {
        name: (value, _items(value) if type(value) in _CONTAINERS else None)
        for name, value in module.__dict__.items()
        if name not in TORCH_KEEPS
    }


def _items(value: Any, depth: int = 0) -> Any:
    """A copy of a container and, some levels deep, of those inside it."""
    if type(value) not in _CONTAINERS or depth > 2:
        return value
    if isinstance(value, dict):
        return {key: (item, _items(item, depth + 1)) for key, item in value.items()}
    if isinstance(value, set):
        return set(value)
    return [(item, _items(item, depth + 1)) for item in value]


def _put_back(module: nn.Module, found: dict[str, tuple[Any, Any]]) -> None:
    """Make the attributes of one module what they were when ``found`` was taken."""
    now = module.__dict__
    for name in [name for name in now if name not in found and name not in TORCH_KEEPS]:
        del now[name]
    for name, (value, items) in found.items():
        if items is not None:
            _refill(value, items)
        if now.get(name, _ABSENT) is not value:
            now[name] = value


def _refill(value: Any, items: Any) -> None:
    if _same(items, value):
        return
    value.clear()
    if isinstance(value, set):
        value.update(items)
        return
    for key, (item, inner) in items.items() if isinstance(value, dict) else enumerate(items):
        if type(item) in _CONTAINERS and inner is not item:
            _refill(item, inner)
        if isinstance(value, dict):
            value[key] = item
        else:
            value.append(item)


def _same(items: Any, value: Any) -> bool:
    """Whether a container still holds what it held."""
    if len(items) != len(value):
        return False
    if isinstance(value, set):
        return bool(items == value)
    pairs = (
        [(value.get(key, _ABSENT), held) for key, held in items.items()]
        if isinstance(value, dict)
        else list(zip(value, items, strict=True))
    )
    return all(
        now is item and (inner is item or type(item) not in _CONTAINERS or _same(inner, item))
        for now, (item, inner) in pairs
    )
