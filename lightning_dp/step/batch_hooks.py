"""Hooks at the start of a batch that change it, as a library's pre-processor does: done to each example by itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_dp.batches.microbatch import BatchAxisError, batch_of_one, is_list_of_values
from lightning_dp.errors import PreflightError
from lightning_dp.lightning_internals import either, overridden
from lightning_dp.loading.form import ExampleForm
from lightning_dp.loading.hook_batch import HookBatch, changes, leaves
from lightning_dp.loading.loader import LogicalBatch, PoissonLoader
from lightning_dp.step.attributes import attributes_put_back
from lightning_dp.step.logs import StepCapture

HOOK = "on_train_batch_start"


@dataclass(frozen=True)
class _Hook:
    """Somebody's ``on_train_batch_start``, as a function of the batch and its number."""

    owner: Any
    run: Callable[[Any, int], Any]
    writes: bool

    @property
    def name(self) -> str:
        return f"{type(self.owner).__name__}.{HOOK}"


class BatchHooks:
    """Applies to the examples of a step what hooks do to their batch.

    Hooks get a placeholder. What they change in it would change nothing in training, where plain training would see the
    changed batch. So a hook that writes into its batch, by its source or because it has been seen to, is run again on
    each example, as a batch of one: its change reaches training_step, and cannot mix examples. Attributes of the hook's
    owner are put back each time, so that nothing of an example stays behind.

    Args:
        form: how a batch comes to the engines and back, before any change; its module and its Trainer's callbacks are asked.
        capture: keeps away what hooks log about single examples.
        loader: of whose first example placeholders are made.
    """

    def __init__(self, form: ExampleForm, capture: StepCapture, loader: PoissonLoader) -> None:
        self._form, self._capture = form, capture
        self._hook_batch = HookBatch(form, loader)
        self._seen_to_write: list[Any] = []
        self._active: list[_Hook] | None = None

    @property
    def sample(self) -> LogicalBatch | None:
        """The sample of the step under way. **Private**."""
        return self._hook_batch.sample

    def shown(self, sample: LogicalBatch) -> Any:
        """What hooks get for this sample."""
        self._active = None
        return self._hook_batch.instead_of(sample)

    def sample_behind(self, batch: Any) -> Any:
        """The sample for which hooks got ``batch``, and ``batch`` itself if it is nothing that they got.

        Raises:
            PreflightError: something has changed the batch, and no hook is found that does so.
        """
        if not self._hook_batch.was_shown(batch):
            return batch
        self._settle(self._hook_batch.changed())
        return self._hook_batch.sample

    def _settle(self, changed: list[str]) -> None:
        """Find the hooks to be run on the examples of the step under way."""
        hooks = list(_hooks(self._form.module))
        self._active = self._those_that_write(hooks)
        if changed and not self._active:
            for hook in hooks:
                batch = self._hook_batch.placeholder()
                before = leaves(batch)
                self._run([hook], batch)
                if changes(before, leaves(batch)):
                    self._seen_to_write.append(hook.owner)
            self._active = self._those_that_write(hooks)
            if not self._active:
                raise PreflightError(
                    f"{changed[0]} was changed before training_step, and not by an {HOOK} that does so again: expected changes "
                    "to a batch in a hook that depends on the batch alone. Put it into on_after_batch_transfer or the dataset."
                )

    @property
    def needed(self) -> bool:
        """Whether any hook changes its batch."""
        return bool(self._to_be_run())

    def applied(self, batch: Any) -> Any:
        """A micro-batch on the device after the hooks of the step under way have changed each of its examples."""
        hooks = self._to_be_run()
        if not hooks:
            return batch
        counts = {len(leaf) for leaf in pytree.tree_leaves(batch, is_leaf=is_list_of_values) if _has_rows(leaf)}
        if len(counts) != 1:  # whose is what is unclear, and is refused later
            return batch
        ones = []
        for index in range(counts.pop()):
            one = self._form.closed(batch_of_one(batch, index))
            self._run(hooks, one)
            ones.append(self._form.opened(one))
        return _together(ones, hooks[0].name)

    def alone(self, run: Callable[[], Any]) -> Any:
        """What a batch transfer hook makes of one example; nothing that it leaves reaches the next.

        Raises:
            PreflightError: it has set something of the data module or the Trainer.
        """
        return self._capture.state.alone(run, "a batch transfer hook")

    def applied_to_one(self, batch: Any) -> Any:
        """A batch of one example, as training_step takes it, after the hooks have changed it."""
        self._run(self._to_be_run(), batch)
        return batch

    def _to_be_run(self) -> list[_Hook]:
        """The hooks that change examples: before the first step, when engines are tried, those that do by their source."""
        if self._active is None:
            self._active = self._those_that_write(list(_hooks(self._form.module)))
        return self._active

    def _those_that_write(self, hooks: list[_Hook]) -> list[_Hook]:
        return [hook for hook in hooks if hook.writes or any(hook.owner is owner for owner in self._seen_to_write)]

    def _run(self, hooks: list[_Hook], batch: Any) -> None:
        if not hooks:
            return
        module = self._form.module
        number = max(0, module.trainer.fit_loop.epoch_loop.batch_idx)
        with self._capture.listening(), attributes_put_back(module, report=False):
            for hook in hooks:
                with _owner_put_back(hook):
                    hook.run(batch, number)


def _hooks(module: pl.LightningModule) -> Iterator[_Hook]:
    """All hooks that somebody has written and that Lightning calls at the start of a batch, in its order."""
    trainer: Any = module.trainer
    for callback in trainer.callbacks:
        function = getattr(callback, HOOK)
        if str(getattr(function, "__module__", "")).split(".")[0] not in (
            "lightning",
            "pytorch_lightning",
            "lightning_dp",
        ):
            run = lambda batch, number, function=function: function(trainer, module, batch, number)  # noqa: E731  # bound
            yield _Hook(callback, run, writes_into_argument(function, 2))
    if overridden(HOOK, module):
        function = getattr(module, HOOK)
        yield _Hook(module, function, writes_into_argument(function, 0))


def writes_into_argument(function: Callable[..., Any], position: int) -> bool:
    """Whether the source of ``function`` assigns to a part of this argument, or calls a method on it that changes it.

    A second look beside what happens to the placeholder, for changes that depend on the content (``if image.max() > 1``).
    Where there is no source the answer is no.
    """
    plain = getattr(function, "__func__", function)
    try:
        return _writes(plain, position + (plain is not function))
    except TypeError:  # a callable object that cannot be kept
        return False


@lru_cache(maxsize=64)  # asked at every step
def _writes(function: Callable[..., Any], position: int) -> bool:
    try:
        name = list(inspect.signature(function).parameters)[position]
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, ValueError, IndexError, SyntaxError):
        return False
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = node.targets
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _changes(node.func.attr):
            targets = [node.func]
        parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
        if any(isinstance(part, (ast.Attribute, ast.Subscript)) and _root(part) == name for part in parts):
            return True
    return False


def _changes(method: str) -> bool:
    in_place = method.endswith("_") and not method.endswith("__")
    return in_place or method in ("update", "pop", "setdefault", "append", "extend", "insert", "clear", "__setitem__")


def _root(node: ast.expr) -> str | None:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


@contextmanager
def _owner_put_back(hook: _Hook) -> Iterator[None]:
    """Undo what a callback has kept of an example, and refuse what cannot be undone."""
    held = {} if isinstance(hook.owner, either(pl.LightningModule)) else vars(hook.owner)
    before = {name: (value, _copy(value)) for name, value in held.items()}
    tensors = [value for value in held.values() if isinstance(value, Tensor)]
    if isinstance(hook.owner, nn.Module):
        tensors += [*hook.owner.buffers(), *hook.owner.parameters()]
    versions = [tensor._version for tensor in tensors]
    try:
        yield
    finally:
        for name in [name for name in held if name not in before]:
            del held[name]
        for name, (value, items) in before.items():
            if items is not None and type(value) in _CONTAINERS:
                _refill(value, items)
            held[name] = value
    if versions != [tensor._version for tensor in tensors]:
        raise PreflightError(
            f"{hook.name} changes its batch, and writes into a tensor of its own: expected one or the other. It is run for "
            "each example, and what it keeps of one would reach the next. Compute statistics beforehand, from public data."
        )


_CONTAINERS = (list, dict, set, deque)


def _copy(value: Any) -> Any:
    return value.copy() if type(value) in _CONTAINERS else None


def _refill(value: Any, items: Any) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(items)
    else:
        value.extend(items)


def _has_rows(leaf: Any) -> bool:
    return (isinstance(leaf, Tensor) and leaf.ndim > 0) or is_list_of_values(leaf)


def _together(ones: list[Any], name: str) -> Any:
    """The examples as one batch again."""
    flattened = [pytree.tree_flatten_with_path(one, is_leaf=is_list_of_values)[0] for one in ones]
    structure = pytree.tree_structure(ones[0], is_leaf=is_list_of_values)
    places = {tuple(pytree.keystr(path) for path, _ in one) for one in flattened}
    columns = list(zip(*([leaf for _, leaf in one] for one in flattened), strict=len(places) == 1))
    shapes = [{leaf.shape for leaf in column if isinstance(leaf, Tensor)} for column in columns]
    if len(places) > 1 or any(len(each) > 1 for each in shapes):
        raise BatchAxisError(
            f"{name} gives the examples of a batch different shapes: expected the same, so that they fit into one batch. Give "
            "it a size, or use physical_batch_size=1."
        )

    def joined(column: tuple[Any, ...]) -> Any:
        if isinstance(column[0], Tensor):
            return torch.cat(column)
        if is_list_of_values(column[0]):
            return type(column[0])(value for values in column for value in values)
        return column[0]

    return pytree.tree_unflatten([joined(column) for column in columns], structure)
