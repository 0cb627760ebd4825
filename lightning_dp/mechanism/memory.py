"""Whether a tensor has the memory that its shape speaks of: reading one whose storage was made smaller ends the process."""

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


def _needed(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    if tensor.is_contiguous():
        return int(tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int(tensor.storage_offset() + last + 1) * tensor.element_size()
