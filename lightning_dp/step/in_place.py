"""A module's parameters and buffers replaced for the length of a pass, wherever it holds them, and its own put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_dp.step.contents import written

Table = dict[str, Tensor | None]
"""A module's ``_parameters`` or ``_buffers``."""


@contextmanager
def replaced_tensors(module: nn.Module, values: Mapping[str, Tensor], *, may_move: bool = False) -> Iterator[None]:
    """Put ``values`` in the places of the parameters and buffers of these names, and the module's own back afterwards.

    Parameters in shards that are not replaced are left to FSDP2, whose hooks put whole ones in their places meanwhile.

    A tensor that is held in several places, or by a submodule under several names, is replaced in all of them.
    (``functional_call`` puts the tensors back in an order that, for a submodule under two names, leaves the replacements in the
    module.)

    Args:
        module: the user's.
        values: by the name in ``named_parameters()`` or ``named_buffers()``.
        may_move: whether this package puts others in the parameters' places meanwhile.

    Raises:
        PreflightError: meanwhile, somebody has put another tensor into one of the places, with other values.
    """
    modules = list(module.named_modules())
    tables = [
        (f"{path}." if path else "", table, one) for path, one in modules for table in (one._parameters, one._buffers)
    ]
    by_id = {
        id(tensor): values[owner + name]
        for owner, table, _ in tables
        for name, tensor in table.items()
        if owner + name in values and tensor is not None
    }
    in_shards = {id(tensor) for _, table, _ in tables for tensor in table.values() if hasattr(tensor, "to_local")}
    before = [_without(table, in_shards - by_id.keys()) for _, table, _ in tables]
    unsaved = [(one, set(one._non_persistent_buffers_set)) for _, one in modules]
    for _, table, _ in tables:
        table.update({name: by_id[id(tensor)] for name, tensor in table.items() if id(tensor) in by_id})
    places = [
        _Places(owner, table, one, _without(table, in_shards - by_id.keys()), table.keys() - found.keys())
        for (owner, table, one), found in zip(tables, before, strict=True)
    ]
    try:
        yield
        changed = [name for one in places if not may_move or one.table is one.module._buffers for name in one.changed()]
        if changed:
            raise written(module, changed)
    finally:
        for one, found in zip(places, before, strict=True):
            for name in one.table.keys() - found.keys() - one.left:
                del one.table[name]
            one.table.update(found)
        for module, names in unsaved:
            module._non_persistent_buffers_set = names


@dataclass(frozen=True)
class _Places:
    """A table of a module, and what a pass begins with.

    Attributes:
        owner: the module's path with a dot, or nothing.
        table: its parameters or its buffers.
        module: itself.
        placed: name → what was put there.
        left: names of those that FSDP2 looks after.
    """

    owner: str
    table: Table
    module: nn.Module
    placed: Table
    left: set[str]

    def changed(self) -> list[str]:
        """Names under which something else is now, with other values; a new buffer that no checkpoint keeps is none."""
        unsaved = self.module._non_persistent_buffers_set
        return [
            self.owner + name
            for name in {**self.placed, **self.table}
            if name not in self.left
            and self.table.get(name) is not self.placed.get(name)
            and not (name not in self.placed and name in unsaved)
            and not _same(self.table.get(name), self.placed.get(name))
        ]


def _without(table: Table, sharded: set[int]) -> Table:
    return {name: tensor for name, tensor in table.items() if id(tensor) not in sharded}


def _same(now: Tensor | None, before: Tensor | None) -> bool:
    """Whether two tensors have one content, for each example of a micro-batch that is run at once."""
    if now is None or before is None or now.shape != before.shape or now.dtype != before.dtype:
        return False
    with torch.no_grad():
        equal = now == before
        return bool((equal | ((now != now) & (before != before))).all())
