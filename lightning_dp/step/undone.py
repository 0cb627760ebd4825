"""Whatever a look does to a module, undone: by contents, and whether it ends well or not."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from lightning_dp.mechanism.memory import give_memory, has_memory
from lightning_dp.step.attributes import attributes_put_back
from lightning_dp.step.contents import Contents
from lightning_dp.step.kept_state import reach_of


@contextmanager
def undone(module: nn.Module) -> Iterator[Contents]:
    """Leave a module and all random generators as they were found, for a look that must leave no trace.

    Put back are: which tensors and modules it holds under which names; their memory, values, ``requires_grad`` and ``.grad``;
    train and eval mode; hooks; attributes, and whatever else is within reach of it at any depth; the global random generators
    and those that it holds. Values are copied to main memory meanwhile, so that a look needs no more of the device's, and only
    those that changed are written.

    Args:
        module: the user's. Of parameters in shards (DTensor), what this rank holds is put back.

    Yields:
        The contents of its tensors as they were found.
    """
    modules = list(module.modules())
    tables = [(table, dict(table)) for one in modules for table in _tables(one)]
    modes = [(one, one.training, set(one._non_persistent_buffers_set)) for one in modules]
    reach = reach_of(module)
    tensors, arrays = dict(reach.tensors), reach.arrays
    tensors |= {f"{name}.grad": one.grad for name, one in tensors.items() if one.is_leaf and one.grad is not None}
    kept = {name: _Kept(tensor) for name, tensor in tensors.items()}
    contents, failure = Contents.of(tensors, arrays), None
    with isolate_rng():
        try:
            with attributes_put_back(module, report=False):
                yield contents
        except BaseException as error:
            failure = error
    for table, found in tables:
        table.clear()
        table.update(found)
    for one, training, names in modes:
        one.training, one._non_persistent_buffers_set = training, names
    for place in reach.places:
        if place.differs():
            place.put_back()
    for tensor in kept.values():
        tensor.put_back_memory()
    for name in contents.changed():
        if name in kept:
            kept[name].put_back_values()
        else:
            np.copyto(arrays[name], contents.copied[name])
    if failure is not None:
        raise failure


class _Kept:
    """A tensor's memory, values and flags."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._requires_grad = tensor, tensor.requires_grad
        self._gradient = tensor.grad if tensor.is_leaf else None
        self._memory = tensor.detach()
        here = _here(tensor)
        self._values = here.to("cpu", copy=True) if has_memory(here) else None

    def put_back_memory(self) -> None:
        tensor, memory = self._tensor, self._memory
        if not hasattr(tensor, "to_local") and _place(tensor) != _place(memory):
            tensor.data = memory
        if tensor.is_leaf:
            tensor.requires_grad_(self._requires_grad)
            tensor.grad = self._gradient

    def put_back_values(self) -> None:
        if self._values is not None:
            with torch.no_grad():
                give_memory(_here(self._tensor))
                _here(self._tensor).copy_(self._values)


def _here(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    whole: Any = tensor.detach()
    part: Tensor = whole.to_local() if hasattr(whole, "to_local") else whole
    return part


def _place(tensor: Tensor) -> tuple[Any, ...]:
    address = tensor.data_ptr() if tensor.layout == torch.strided else 0
    return address, tensor.shape, tensor.stride() if tensor.layout == torch.strided else (), tensor.dtype, tensor.device


def _tables(module: nn.Module) -> list[dict[Any, Any]]:
    """Where a module holds tensors, modules and hooks."""
    hooks = [value for value in module.__dict__.values() if type(value) is OrderedDict]
    own: list[dict[Any, Any]] = [module._parameters, module._buffers, module._modules]
    return own + [table for table in hooks if all(table is not one for one in own)]
