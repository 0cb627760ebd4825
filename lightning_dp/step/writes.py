"""The line of the user's own in which a tensor of the module is written to, for messages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_dp.engines.user_code import Line, line_of_the_caller


class FindWrite(TorchFunctionMode):
    """While open, remembers the first line that changes one of ``tensors`` in place.

    Args:
        tensors: to be watched, with whatever shares their memory.

    Attributes:
        line: where, or ``None`` as long as nothing is seen. NumPy's writes are not seen, but who asks for its view is.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)
        self._addresses = {_address(tensor) for tensor in self._tensors}
        self.line: Line | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.line is None and args and _may_write(func):
            first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
            if isinstance(first, Tensor) and _address(first) in self._addresses:
                self.line = line_of_the_caller()
        return func(*args, **kwargs)


def _may_write(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in {"__set__", "__setitem__", "numpy", "__array__"} or name.startswith("__i")


def _address(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr() or -1
    except (RuntimeError, NotImplementedError):  # it has none of its own
        return -1
