"""Products in full precision, whatever ``torch.set_float32_matmul_precision``, cuDNN and autocast allow elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from lightning_dp.mechanism.while_open import WhileOpen

_FULL = ("none", "ieee")


@contextmanager
def full_precision() -> Iterator[None]:
    """While open, float32 matrices are multiplied, and convolved, in float32.

    ``"high"`` and ``"medium"`` let the factors be rounded to 10 or 7 bits first, an error of 2⁻¹¹ or 2⁻⁸ of their *sizes*.
    That is no matter in the user's network, for the gradient is then that of the network as it was computed. But a norm
    that is found from Gram matrices may be far smaller than its terms: by such an error an example would be clipped
    too little, and sensitivity would exceed the clip norm. (Their rounding to float32 is taken into account, see
    :func:`lightning_dp.engines.ghost.contribution.gram_norms`.) So norms and sums are always computed in full.

    The setting is one of the whole process. Other threads multiply in full meanwhile too, and it is put back when no
    thread is here any more. Nothing is set where it is full already. For convolutions on CUDA torch's default is not: the
    weighted sum of gradients that are kept in factors is one, of factors whose product may nearly cancel.

    Autocast, should the caller's be around the whole step and not around the user's training_step alone, is off meanwhile, in
    this thread: it would round to 8 bits.
    """
    with ExitStack() as stack:
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_full_products())
        yield


_AUTOCAST = ("cpu", "cuda")


@contextmanager
def _full_products() -> Iterator[None]:
    if _convolutions_are_full() and all(backend.fp32_precision in _FULL for backend in _backends()):
        yield
        return
    with _SETTING.open():
        yield


class _OneForAll:
    """The setting of PyTorch 2.8, which is one for all backends."""

    @property
    def fp32_precision(self) -> str:
        precision = torch.get_float32_matmul_precision()
        return "ieee" if precision == "highest" else precision

    @fp32_precision.setter
    def fp32_precision(self, precision: str) -> None:
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else precision)


def _backends() -> tuple[Any, ...]:
    backends: Any = torch.backends
    if not hasattr(backends.mkldnn, "matmul"):
        return (_OneForAll(),)
    return backends.cuda.matmul, backends.mkldnn.matmul


def _convolutions_are_full() -> bool:
    """Whether cuDNN convolves in full, or is not used, since nothing is on a GPU."""
    cudnn: Any = torch.backends.cudnn
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return True
    return cudnn.conv.fp32_precision in _FULL if hasattr(cudnn, "conv") else not cudnn.allow_tf32


@contextmanager
def _full_convolutions() -> Iterator[None]:
    """Set and put back by the older name, unless it refuses to be read because somebody has set one of the newer ones."""
    cudnn: Any = torch.backends.cudnn
    kinds = [cudnn.conv, cudnn.rnn] if hasattr(cudnn, "conv") else []
    try:
        older: bool | None = cudnn.allow_tf32
    except RuntimeError:
        older = None
    newer = [kind.fp32_precision for kind in kinds]
    if older is not None:
        cudnn.allow_tf32 = False
    if not _convolutions_are_full():
        for kind in kinds:
            kind.fp32_precision = "ieee"
    try:
        yield
    finally:
        for kind, precision in zip(kinds, newer, strict=True):
            kind.fp32_precision = precision
        if older is not None:
            cudnn.allow_tf32 = older


@contextmanager
def _full() -> Iterator[None]:
    before = [(backend, backend.fp32_precision) for backend in _backends()]
    try:
        for backend, _ in before:
            backend.fp32_precision = "ieee"
        with nullcontext() if _convolutions_are_full() else _full_convolutions():
            yield
    finally:
        for backend, precision in before:
            backend.fp32_precision = precision


_SETTING = WhileOpen(_full)
