"""Where a tensor's numbers are: whether it has the memory that its shape speaks of, and how they come to a device.

Reading a tensor whose storage was made smaller ends the process.
"""

from __future__ import annotations

import torch
from torch import Tensor


def has_memory(tensor: Tensor) -> bool:
    """Whether the storage of ``tensor`` reaches to its last number. Tensors that are not strided have what they need.

    Example:
        >>> tensor = torch.zeros(3)
        >>> before = has_memory(tensor)
        >>> _ = tensor.untyped_storage().resize_(0)
        >>> before, has_memory(tensor)
        (True, False)
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return True
    return tensor.untyped_storage().nbytes() >= _needed(tensor)


def give_memory(tensor: Tensor) -> None:
    """Make the storage of ``tensor`` large enough for it again. What it holds then is for the caller to write."""
    if not has_memory(tensor):
        tensor.untyped_storage().resize_(_needed(tensor))


_COPIES_AT_ONCE = {"cpu", "mps"}
"""Where Lightning's transfer of a batch does not queue copies either."""


def queued_to(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of the host on a device, without waiting until that has done what is queued, as ``.to(device)`` does.

    Args:
        tensor: on the host, not in pinned memory. CUDA has read it when this returns, so it may be written to.
        device: where to.
        dtype: of the result; as it is by default.

    Source: CUDA Driver API, "API synchronization behavior", on asynchronous copies from pageable memory.
    """
    return tensor.to(device=device, dtype=dtype or tensor.dtype, non_blocking=device.type not in _COPIES_AT_ONCE)


def _needed(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()
