"""A device that computes nothing, and a host that must not wait for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
_COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}
_ASKS = {"_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"}
"""Calls whose result, or the shape of whose result, the host has to know."""


class WaitError(AssertionError):
    """The host would wait until the device has done all that is queued."""


class WrongDeviceError(AssertionError):
    """A tensor of the host beside one of the device."""


class _Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or call."""
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [one.device.type == DEVICE.type for one in given]
        if func.overloadpacket in _COPIES:
            into = kwargs.get("device") if len(given) == 1 else given[0].device
            moves = into is not None and (torch.device(into).type == DEVICE.type) != there[-1]
            if moves and not (kwargs.get("non_blocking") or (len(given) == 2 and args[2:3] == (True,))):
                raise WaitError(f"{func} between host and device, of shape {tuple(given[-1].shape)}, not non_blocking")
        elif any(there):
            name = func.overloadpacket.__name__
            if name in _ASKS or (name == "index" and any(one.dtype == torch.bool for one in given[1:])):
                raise WaitError(f"{func}: the host has to know what is on the device")
            if any(one.ndim for one, is_there in zip(given, there, strict=True) if not is_there):
                raise WrongDeviceError(f"{func} of tensors on {[str(one.device) for one in given]}")
        return func(*args, **kwargs)


class _Made(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or call."""
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == DEVICE.type:
            raise WaitError(
                f"{func.__name__}(…, device={kwargs['device']}): numbers of the host are copied, and waited for"
            )
        return func(*args, **kwargs)


@contextmanager
def queued() -> Iterator[None]:
    """While it is open, these are errors:

    - a call with tensors of the host and of the device, unless the host's is a single number, as on any device,
    - a call on the device whose result, or the shape of whose result, the host has to know,
    - a copy between the two, in either direction, that is not ``non_blocking``: PyTorch waits for the queue then,
    - a tensor of the device that is made of Python's numbers, for it is copied so.
    """
    with _Calls(), _Made():
        yield
