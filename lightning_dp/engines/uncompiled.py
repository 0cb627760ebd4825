"""What the user has put under ``torch.compile``, while an engine differentiates it example by example."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lightning_dp.mechanism.while_open import WhileOpen

_EAGER = WhileOpen(lambda: torch.compiler.set_stance("force_eager"))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled functions and modules as they were written, while open.

    ``torch.compile`` cannot look into the transforms of ``torch.func`` that are around it: it would compile bits of the
    engine's own book-keeping instead, again for every size of micro-batch. The result is the same without it.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled, and importing the compiler takes seconds
        yield
        return
    with _EAGER.open():
        yield


def compiled_parts(module: nn.Module) -> list[str]:
    """Names of the submodules of ``module`` that are under ``torch.compile``; the whole of it is called ``module``."""
    whole = getattr(module, "_compiler_ctx", None) is not None  # Lightning's, for torch.compile(lightning_module)
    found = ["module"] if whole else []
    for name, part in module.named_modules():
        if getattr(part, "_compiled_call_impl", None) is not None or type(part).__name__ == "OptimizedModule":
            found.append(name or "module")
    return found
